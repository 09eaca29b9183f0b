"""One-shot pruning on data: in a few rounds, each of which measures, decides and reconstructs.

A round measures what it costs to take units out of every block when the others make up for it (`loss_curves`), spends
its budget where that costs least (`selection.knapsack`), and fits every linear layer that is left to what the dense
model does at the same place (`reconstruction`). Then the next one measures again, on the reconstructed model: a single
ranking collapses where much goes. A pass from the bottom to the top that decides block by block (K-prune, Park et al.,
2024, arXiv:2308.03449) measures again too, but decides the lowest blocks while the others are dense.

Labels are not needed. Hidden dimensions stay, unless they are named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from cofiprune.compaction.slicing import compacted
from cofiprune.data.batches import model_inputs
from cofiprune.errors import DataError, TargetError
from cofiprune.oneshot.layerwise import Batch, first_batches, projections
from cofiprune.oneshot.loss_curves import block_curves, hidden_curve
from cofiprune.oneshot.reconstruction import Reconstruction
from cofiprune.oneshot.sensitivity import position_weights
from cofiprune.plan import Plan
from cofiprune.selection.curves import LossCurve, units_kept
from cofiprune.selection.knapsack import best_sizes
from cofiprune.selection.reachable import check_target
from cofiprune.selection.target import Target
from cofiprune.structure import Structure, UnitKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEP = 0.4
"""Share of the model that one round leaves at least."""
FIT_POSITIONS, FIT_PER_INPUT = 10_000, 4
"""Tokens, patches or frames that linear layers are fitted on: so many, and at least four for each input of the
widest."""
SCORED_POSITIONS = 6_000
"""Positions that the curves are measured on."""
INNER = ("heads", "intermediate")
"""Kinds of groups that are cut unit by unit, by what is left taking over."""
NARROWEST = 8
"""One hidden dimension in so many stays: norms over a handful leave nothing to reconstruct."""


def check_one_shot(structure: Structure, target: Target, units: str | Sequence[UnitKind] | None) -> None:
    """Make sure that a target can be met without cutting hidden dimensions.

    :raises TargetError: saying what can be reached.
    """
    if not can_start(structure, units):
        raise TargetError('one shot on data cuts heads and feed-forward dimensions: units must include "head" or '
                          '"intermediate"')  # fmt: skip
    check_target(structure, target, tuple({group.unit for group in structure.select(units)} - {"hidden"}))


def can_start(structure: Structure, units: str | Sequence[UnitKind] | None) -> bool:
    """Return whether the unit kinds include what this method cuts: heads or feed-forward dimensions."""
    return any(group.kind in INNER for group in structure.select(units))


def calibration(model: PreTrainedModel, structure: Structure, batches: Iterable[Mapping[str, Tensor]]) -> list[Batch]:
    """Take calibration data from a data set: batches of what the model reads, as many as the statistics need.

    :raises DataError: when there are fewer positions than a projection has inputs.
    """
    last = [path for paths in projections(model, structure).values() for path in paths]
    widths = [model.get_parameter(f"{path}.weight").shape[1] for path in last]
    needed = max(widths, default=1)
    most = max(FIT_POSITIONS, FIT_PER_INPUT * needed)
    found, positions = first_batches(model, structure, (model_inputs(batch, model) for batch in batches), most)
    if positions < needed:
        raise DataError(
            f"the data set has {positions} positions (tokens, patches or frames) that are no padding; the statistics "
            f"of this model need at least {needed}, one for each input of its widest projection; up to {most} are used"
        )
    return found


def rounds(share: float) -> list[float]:
    """Return the shares that are left after each round, evenly on a logarithmic scale, for a share left in the end.

    >>> [round(left, 3) for left in rounds(0.2)]
    [0.447, 0.2]
    """
    number = max(1, math.ceil(math.log(share) / math.log(STEP)))
    return [share ** ((index + 1) / number) for index in range(number)]


@dataclass(frozen=True)
class RoundPruning:
    """One run of the method on a model, which it leaves as it is."""

    model: PreTrainedModel
    """Without masks, in evaluation mode; the reconstruction aims at the outputs of its blocks."""
    structure: Structure
    batches: Sequence[Batch]
    """See `calibration`; at least one."""
    target: Target
    """Met as nearly as whole units allow."""
    _: KW_ONLY
    units: str | Sequence[UnitKind] | None = None
    """Kinds that may be cut: heads and feed-forward dimensions, with "layer" also whole blocks, and hidden dimensions
    where they are named."""
    seed: int = 0
    reconstruct: bool = True
    """Whether what is left is reconstructed after every round."""

    def run(self, on_progress: Callable[[float], None] | None = None) -> tuple[Plan, PreTrainedModel]:
        """Prune.

        :param on_progress: called with the share done, in (0, 1].
        :return: what is kept, in terms of the model, and the smaller, reconstructed model.
        """
        report = on_progress or (lambda share: None)
        weights = {}
        if self.reconstruct:
            weights = position_weights(self.model, self.structure, self.batches, seed=self.seed)
        plan, structure = Plan.from_values(self.structure, {}), self.structure
        small = compacted(self.model, structure, plan)
        goals = self._goals()
        for number, goal in enumerate(goals):
            try:
                cut = self._cut(small, structure, goal)
            except TargetError:
                if goal is self.target:
                    raise
                continue  # sizes that go in large steps need not meet what lies on the way
            small, plan = compacted(small, structure, cut), plan.then(cut)
            structure = structure.cut(cut.kept)
            if self.reconstruct:
                reconstruction = Reconstruction(self.model, self.structure, small, plan, self.batches, weights)
                reconstruction.run(lambda done, before=number: report((before + done) / len(goals)))  # type: ignore[misc]
            else:
                report((number + 1) / len(goals))
        return plan, small

    def _goals(self) -> list[Target]:
        """Return the target of each round; the last one is the target itself."""
        here = self.target.kept_share(self.structure)
        shares = rounds((1 - self.target.share) / here)
        return [*(self.target.at(1 - share * here) for share in shares[:-1]), self.target]

    def _cut(self, small: PreTrainedModel, structure: Structure, goal: Target) -> Plan:
        """Decide what to take out of the small model; where the goal is measured, what is decided is."""
        curves = dict(self._curves(small, structure))

        def plan_for(aim: Target) -> Plan:
            sizes = best_sizes(structure, curves, aim)
            if aim.needs_levels(structure):
                aim.check(structure, sizes)
            return Plan.from_values(structure, units_kept(structure, curves, sizes))

        return goal.settle(plan_for, lambda plan: compacted(small, structure, plan))

    def _curves(self, small: PreTrainedModel, structure: Structure) -> Iterator[tuple[str, LossCurve]]:
        """Give the curves of the groups of which some units may go."""
        scored, _ = first_batches(small, structure, self.batches, SCORED_POSITIONS)
        chosen = self.structure.select(self.units)
        inner = {group.name for group in chosen if group.kind in INNER}
        may_empty = any(group.unit == "layer" for group in chosen)
        blocks = [block for block in structure.blocks if block.inner in inner or (may_empty and block.inner)]
        found = block_curves(small, structure, [block.gate for block in blocks], scored, seed=self.seed)
        for block in blocks:
            if block.gate not in found:
                continue
            curve = found[block.gate]
            if block.inner is not None and block.inner in inner:
                yield block.inner, curve if may_empty else curve.keeping(1)
            if may_empty:
                yield block.gate, LossCurve((0,), curve.loss[-1:])
        if self.units is not None and any(group.kind == "hidden" for group in chosen):
            stream = hidden_curve(small, structure, scored, seed=self.seed)
            if stream is not None:
                yield "hidden", stream.keeping(max(self.structure["hidden"].size // NARROWEST, 2))

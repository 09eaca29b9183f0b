"""One-shot pruning on data: in a few sweeps, each of which measures, decides and repairs.

A sweep measures what it costs to take units out of every block when the others make up for it (`surgeon`), spends its
budget where that costs least (`budgeting`), and fits every map of what is left to what the whole model does at the same
place (`repair`). Then the next one measures again, on the repaired model: a single ranking collapses where much goes.
A pass from the bottom to the top that decides block by block (K-prune, Park et al., 2024, arXiv:2308.03449) measures
again too, but decides the lowest blocks while the others are whole.

Labels are not needed. Hidden dimensions stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cofiprune.adapter import structure as structure_of
from cofiprune.compaction import compact
from cofiprune.data.batches import ROWS
from cofiprune.data.tasks import label_names
from cofiprune.errors import DataError, TargetError
from cofiprune.oneshot.decision import Candidate, decide
from cofiprune.oneshot.layerwise import Batch, Projection, counted, projections
from cofiprune.oneshot.loss_curves import Curve, Moments, curve
from cofiprune.oneshot.reconstruction import Repair
from cofiprune.oneshot.sensitivity import passed
from cofiprune.oneshot.stream import hidden_curve
from cofiprune.plan import Plan
from cofiprune.selection.reachable import check_target
from cofiprune.selection.target import Target
from cofiprune.structure import Block, Side, Structure, UnitKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEP = 0.4
"""Share of the model that one sweep leaves at least."""
FIT_POSITIONS, FIT_PER_INPUT = 10_000, 4
"""Tokens, patches or frames that the maps are fitted on: so many, and at least four for each input of the widest."""
SCORED_POSITIONS = 6_000
"""What the curves are measured on."""
NARROWEST = 8
"""One hidden dimension in so many stays: norms over a handful leave nothing to repair."""


def check_one_shot(structure: Structure, target: Target, units: str | Sequence[UnitKind] | None) -> None:
    """Make sure that a target can be met without cutting hidden dimensions.

    :raises TargetError: saying what can be reached.
    """
    kinds = tuple({group.unit for group in structure.select(units) if group.kind != "hidden"})
    if not can_start(structure, units):
        raise TargetError('one shot on data cuts heads and feed-forward dimensions: units must include "head" or '
                          '"intermediate"')  # fmt: skip
    check_target(structure, target, kinds)


def can_start(structure: Structure, units: str | Sequence[UnitKind] | None) -> bool:
    """Whether there is anything among the unit kinds that this method cuts: heads or feed-forward dimensions."""
    return bool(_inner(structure, units))


def calibration(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> list[Batch]:
    """Take from a data set what the statistics need: batches of what the model reads, without labels.

    :raises DataError: when there are fewer positions than a projection has inputs.
    """
    structure = structure_of(model)
    needed = max((_shape(model, last)[0] for last in projections(model, structure).values()), default=1)
    enough = positions_used(needed)
    left_out = {ROWS, *label_names(model)}
    taken: list[Batch] = []
    found = 0
    for batch in batches:
        taken.append({name: value for name, value in batch.items() if name not in left_out})
        found += counted(model, structure, taken[-1])
        if found >= enough:
            break
    if found < needed:
        raise DataError(
            f"the data set has {found} positions (tokens, patches or frames) that are no padding; the statistics of "
            f"this model need at least {needed}, one for each input of its widest projection; up to {enough} are used"
        )
    return taken


def positions_used(widest: int) -> int:
    """How many positions the statistics are taken over, where there are as many.

    :param widest: inputs of the widest last projection of a block.
    """
    return max(FIT_POSITIONS, FIT_PER_INPUT * widest)


class SequentialPruning:
    """One run of the method on a model, which it leaves as it is."""

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        target: Target,
        *,
        units: str | Sequence[UnitKind] | None = None,
        seed: int = 0,
        repair: bool = True,
    ) -> None:
        """Set up a run.

        :param model: without masks, in evaluation mode; what its blocks put out is what the repair aims at.
        :param batches: see `calibration`; at least one.
        :param target: met as nearly as whole units allow.
        :param units: kinds that may be cut; of them only heads and feed-forward dimensions are, and with "layer" also
            whole blocks.
        :param repair: whether what is left is refitted after every sweep.
        """
        self.model = model
        self.batches = batches
        self.structure = structure_of(model)
        self.target = target
        self.pending = set(_inner(self.structure, units))
        chosen = self.structure.select(units)
        self.may_empty = any(group.unit == "layer" for group in chosen)
        self.cuts_hidden = units is not None and any(group.kind == "hidden" for group in chosen)
        self.seed = seed
        self.repair = repair
        self.scored = _scored(model, self.structure, batches)

    def run(self, on_progress: Callable[[float], None] | None = None) -> tuple[Plan, PreTrainedModel]:
        """Prune.

        :param on_progress: called with the share done, in (0, 1].
        :return: what is kept, in terms of the model, and the smaller, repaired model.
        """
        report = on_progress or (lambda share: None)
        weights = position_weights(self.model, self.batches, seed=self.seed) if self.repair else {}
        plan = Plan.from_values(self.structure, {})
        small = compact(self.model, plan)
        goals = self._goals()
        for number, goal in enumerate(goals):
            try:
                cut = self._cut(small, goal)
            except TargetError:
                if goal is self.target:
                    raise
                continue  # sizes that go in large steps need not meet what lies on the way
            small, plan = compact(small, cut), plan.then(cut)
            if not self.repair:
                report((number + 1) / len(goals))
                continue
            repair = Repair(
                self.model, self.structure, small, structure_of(small), plan, self.batches,
                ridge=None, weights=weights, everything=True,
            )  # fmt: skip
            repair.run(lambda done, before=number: report((before + done) / len(goals)))  # type: ignore[misc]
        return plan, small

    def _goals(self) -> list[Target]:
        """What each sweep is to leave; the last one the target itself."""
        here = self.target.kept_share(self.structure)
        shares = sweeps((1 - self.target.share) / here)
        return [*(self.target.at(1 - share * here) for share in shares[:-1]), self.target]

    def _stream(self, small: PreTrainedModel, structure: Structure) -> Curve | None:
        """What it costs to take out hidden dimensions, where they may be cut; infinitely much, of those that stay."""
        found = hidden_curve(small, structure, self.scored, seed=self.seed) if self.cuts_hidden else None
        if found is None:
            return None
        stays = max(self.structure["hidden"].size // NARROWEST, 2)
        most = max(len(found.order) - stays, 0)
        return Curve(found.order, (*found.losses[:most], *[math.inf] * (len(found.order) - most)))

    def _cut(self, small: PreTrainedModel, goal: Target) -> Plan:
        """What to take out of the small model; where the goal is measured, what is decided is."""
        structure = structure_of(small)
        candidates = [
            Candidate(block, found, in_part=block.inner in self.pending, as_a_whole=self.may_empty)
            for block, found in self._curves(small, structure)
        ]
        stream = self._stream(small, structure)

        def plan_for(aim: Target) -> Plan:
            return decide(structure, candidates, aim, stream)

        return goal.settle(plan_for, lambda plan: compact(small, plan))

    def _curves(self, small: PreTrainedModel, structure: Structure) -> Iterator[tuple[Block, Curve]]:
        """What it costs to take units out of each block that may be cut, or go."""
        blocks = {
            block.gate: block
            for block in structure.blocks
            if block.inner in self.pending or (self.may_empty and block.inner in structure)
        }
        wanted = {gate: last for gate, last in projections(small, structure).items() if gate in blocks}
        moments = {gate: Moments(*_shape(small, last)) for gate, last in wanted.items()}
        for seen in passed(small, wanted, self.scored, seed=self.seed):
            for gate, what in seen.items():
                moments[gate].add(what)
        # Gradients carry what is not finite down to the blocks before; the inputs say where it comes from.
        source = next((gate for gate, found in moments.items() if not bool(found.plain.isfinite().all())), None)
        for gate, last in {**({source: wanted[source]} if source else {}), **wanted}.items():
            found = moments.pop(gate)
            if not found.finite:
                raise DataError(
                    f"what passes {last.module} on the rows of the data set is not finite, so that there are no "
                    "statistics of it. Look for values that overflow in the rows or, in half precision, in the model"
                )
            module, side = small.get_submodule(last.module), _inputs_of(structure, last)
            assert isinstance(module, torch.nn.Linear)
            if side is not None and found.rows:  # weights that another module reads itself are not seen
                yield blocks[gate], curve(module, found, side)


def position_weights(model: PreTrainedModel, batches: Sequence[Batch], *, seed: int) -> dict[str, list[Tensor]]:
    """How much the answers of a model depend on each position: [N] for every batch, by the gate of the block."""
    wanted = projections(model, structure_of(model))
    found: dict[str, list[Tensor]] = {gate: [] for gate in wanted}
    for seen in passed(model, wanted, batches, seed=seed):
        for gate, what in seen.items():
            found[gate].append(what.weights)
    return found


def sweeps(share: float) -> list[float]:
    """The shares that are left after each sweep, evenly on a logarithmic scale, for what is to be left in the end.

    >>> [round(left, 3) for left in sweeps(0.2)]
    [0.447, 0.2]
    """
    number = max(1, math.ceil(math.log(share) / math.log(STEP)))
    return [share ** ((index + 1) / number) for index in range(number)]


def _inputs_of(structure: Structure, last: Projection) -> Side | None:
    """How the inputs of a block's last projection divide into units."""
    return next(spec.sides[1] for spec in structure.parameters if spec.name == f"{last.module}.weight")


def _shape(model: PreTrainedModel, last: Projection) -> tuple[int, int]:
    outputs, inputs = model.get_parameter(f"{last.module}.weight").shape
    return inputs, outputs


def _scored(model: PreTrainedModel, structure: Structure, batches: Sequence[Batch]) -> list[Batch]:
    """The first batches, up to the limit."""
    taken: list[Batch] = []
    found = 0
    for batch in batches:
        taken.append(batch)
        found += counted(model, structure, batch)
        if found >= SCORED_POSITIONS:
            break
    return taken


def _inner(structure: Structure, units: str | Sequence[UnitKind] | None) -> list[str]:
    """Names of the groups inside blocks that may be cut and have something to cut, from the bottom to the top."""
    chosen = {group.name for group in structure.select(units) if group.size}
    names = [block.inner for block in structure.blocks if block.inner in chosen]
    return [name for name in names if name is not None and structure[name].layer is not None]

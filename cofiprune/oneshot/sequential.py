"""One-shot pruning on data: block by block from the bottom, measured again and repaired after every cut.

The order in which units go is that of K-prune (Park et al., 2024, arXiv:2308.03449): score everything that is left on
the model as it stands, find the threshold that the rest of the budget allows, but cut only the lowest block that
is still whole; fit the block's last projection so that the residual stream after it is what the whole model
has there; go up. Measuring again, and tuning weights, is why this holds where a single ranking collapses.

The score of a unit is its importance (`measured_importance`) by the cost that it saves. Labels are not needed.
Hidden dimensions stay: what they carry cannot be put back by any one projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cofiprune.adapter import structure as structure_of
from cofiprune.batches import ROWS
from cofiprune.compaction import compact
from cofiprune.errors import DataError, TargetError
from cofiprune.masking import attach
from cofiprune.oneshot.activations import Batch, LayerWalk, Projection, counted, projections, valid_rows
from cofiprune.oneshot.fisher import measured_importance
from cofiprune.oneshot.repair import LeastSquares
from cofiprune.plan import Plan
from cofiprune.selection import best_units, check_target, sizes_for
from cofiprune.structure import Block, Structure, UnitKind
from cofiprune.target import Target
from cofiprune.tasks import label_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RIDGE = 1e-3
"""Pull towards the weights as they are, relative to the mean squared input; real inputs need little."""
FIT_POSITIONS = 27_000
"""Tokens, patches or frames that the projections are fitted on: some twenty times the unknowns of each output."""
SCORED_POSITIONS, SCORED_EXAMPLES = 16_000, 384
"""What importance is measured on: no more than either."""
_SCORED_TOGETHER = 8
"""Examples per random projection of the predictions: more projections are a better estimate, and slower."""


def check_one_shot(structure: Structure, target: Target, units: str | Sequence[UnitKind] | None) -> None:
    """Make sure that a target can be met without cutting hidden dimensions.

    :raises TargetError: saying what can be reached.
    """
    kinds = tuple({group.unit for group in structure.select(_listed(units)) if group.kind != "hidden"})
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
    left_out = {ROWS, *label_names(model)}
    taken: list[Batch] = []
    found = 0
    for batch in batches:
        taken.append({name: value for name, value in batch.items() if name not in left_out})
        found += counted(model, structure, taken[-1])
        if found >= FIT_POSITIONS:
            break
    widths = [model.get_parameter(f"{part.module}.weight").shape[1] for part in projections(model, structure).values()]
    needed = max(widths, default=1)
    if found < needed:
        raise DataError(
            f"the data set has {found} positions (tokens, patches or frames) that are no padding; the statistics of "
            f"this model need at least {needed}, and up to {FIT_POSITIONS} are used"
        )
    return taken


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
    ) -> None:
        """Set up a run.

        :param model: without masks, in evaluation mode; what its blocks put out is what the repair aims at.
        :param batches: see `calibration`; at least one.
        :param target: met as nearly as whole units allow.
        :param units: kinds that may be cut; of them only heads and feed-forward dimensions are, and with "layer" also
            the blocks of which nothing would be left.
        """
        self.model = model
        self.batches = batches
        self.structure = structure_of(model)
        self.cost = target.cost(self.structure)
        self.wanted = target.left
        self.pending = _inner(self.structure, units)
        self.may_empty = any(group.unit == "layer" for group in self.structure.select(_listed(units)))
        self.seed = seed
        self.scored = _scored(model, self.structure, batches)
        self.keep: dict[str, tuple[int, ...]] = {}
        self.small = compact(model, Plan.from_values(self.structure, {}))
        self.sizes = self._levels(target) if target.by_levels(self.structure) else None

    def run(self, on_progress: Callable[[float], None] | None = None) -> tuple[Plan, PreTrainedModel]:
        """Prune, from the bottom to the top.

        :param on_progress: called with the share done, in (0, 1].
        :return: what is kept, in terms of the model, and the smaller, repaired model.
        """
        whole = projections(self.model, self.structure)
        above = LayerWalk(self.model, self.structure, self.batches)
        walk = LayerWalk(self.small, self.structure, self.batches)
        blocks = [block for block in self.structure.blocks if block.inner in self.pending]
        for layer in range(len(self.structure.layers)):
            here = [block for block in blocks if self.structure[block.gate].layer == layer]
            targets = self._targets(above, [whole[block.gate] for block in here if block.gate in whole])
            for block in here:
                self._cut(block)
                walk.follow(self.small, structure_of(self.small))
                left = projections(self.small, structure_of(self.small))
                if block.gate in targets and block.gate in left:
                    self._refit(walk, left[block.gate], targets[block.gate])
                if on_progress is not None:
                    on_progress((blocks.index(block) + 1) / len(blocks))
            for index in range(len(walk.batches)):
                walk.look(index, settle=True)
            above.advance()
            walk.advance()
        return self._plan(self.structure, self.keep), self.small

    def _targets(self, walk: LayerWalk, wanted: Sequence[Projection]) -> dict[str, list[Tensor]]:
        """What the whole model has after each block of a layer, by gate: a tensor [N, H] for each batch."""
        targets: dict[str, list[Tensor]] = {projection.block.gate: [] for projection in wanted}
        for index, batch in enumerate(walk.batches):
            for gate, passage in walk.look(index, wanted, settle=True).items():
                targets[gate].append(valid_rows(passage.sum, batch))
        return targets

    def _cut(self, block: Block) -> None:
        """Decide on a block's inner units, and take the others out of the small model."""
        assert block.inner is not None
        self.keep[block.inner] = self._chosen(block)
        self.pending = [name for name in self.pending if name != block.inner]
        structure = structure_of(self.small)
        self.small = compact(self.small, self._plan(structure, {block.inner: self.keep[block.inner]}))

    def _chosen(self, block: Block) -> tuple[int, ...]:
        """The units of a block above the threshold that the budget for all undecided blocks allows."""
        masks = attach(self.small)
        try:
            found = measured_importance(
                self.small, masks, self.pending, self.scored, seed=self.seed, limit=len(self.scored)
            )
        finally:
            masks.detach()
        assert block.inner is not None
        importance = {name: values.double().cpu() for name, values in found.items()}
        if self.sizes is not None:
            best = importance[block.inner].argsort(descending=True)[: self.sizes[block.inner]]
            return tuple(sorted(best.tolist()))
        saved = {name: self._saving(name) for name in self.pending}
        candidates = sorted(
            (-float(value) / saved[name], position, unit)
            for position, name in enumerate(self.pending)
            for unit, value in enumerate(importance[name])
        )
        budget = self.wanted - self.cost.exact(self._sizes(dict.fromkeys(self.pending, 0)))
        kept: list[int] = []
        for _, position, unit in candidates:
            price = saved[self.pending[position]]
            if budget < (price / 2 if len(self.pending) == 1 else price):  # the last block rounds
                break
            budget -= price
            if self.pending[position] == block.inner:
                kept.append(unit)
        if not kept and not self.may_empty:
            kept = [int(importance[block.inner].argmax())]
        return tuple(sorted(kept))

    def _levels(self, target: Target) -> dict[str, int]:
        """Decide on the sizes of all groups beforehand, by what is measured on the whole model."""
        gates = [block.gate for block in self.structure.blocks if self.may_empty and block.inner in self.pending]
        with attach(self.small) as masks:
            found = measured_importance(
                self.small, masks, [*self.pending, *gates], self.scored, seed=self.seed, limit=len(self.scored)
            )
        worth = {name: values.double().cpu() for name, values in found.items()}

        def decide(goal: Target) -> Plan:
            sizes = sizes_for(self.structure, worth, goal, may_empty=self.may_empty)
            kept = best_units({name: worth[name] for name in self.pending}, sizes)
            gone = {gate: torch.zeros(1) for gate in gates if not sizes[gate]}
            return Plan.from_values(self.structure, {**{name: mask.double() for name, mask in kept.items()}, **gone})

        return target.settle(decide, lambda plan: compact(self.model, plan)).kept

    def _sizes(self, pending: Mapping[str, int]) -> dict[str, int]:
        """Sizes of all groups with what was decided and some sizes of what was not; open blocks stay open."""
        sizes = {**self.structure.sizes, **{name: len(units) for name, units in self.keep.items()}, **pending}
        for block in self.structure.blocks:
            if block.inner in self.keep and not self.keep[block.inner]:
                sizes[block.gate] = 0
        return sizes

    def _saving(self, name: str) -> int:
        """What one unit costs: the cost is linear in the size of each group."""
        return self.cost.exact(self._sizes({name: 1})) - self.cost.exact(self._sizes({name: 0}))

    def _refit(self, walk: LayerWalk, projection: Projection, targets: Sequence[Tensor]) -> None:
        module = self.small.get_submodule(projection.module)
        assert isinstance(module, torch.nn.Linear)
        if not module.weight.requires_grad:
            return  # frozen weights stay as they are
        fit = LeastSquares(module.in_features, module.out_features)
        for index, (batch, target) in enumerate(zip(walk.batches, targets, strict=True)):
            passage = walk.look(index, [projection])[projection.block.gate]
            sums = valid_rows(passage.sum, batch)
            fit.add(valid_rows(passage.inputs, batch), target.to(sums) - sums)
        fit.correct(module, RIDGE)

    @staticmethod
    def _plan(structure: Structure, keep: Mapping[str, tuple[int, ...]]) -> Plan:
        masks = {}
        for name, units in keep.items():
            masks[name] = torch.zeros(structure[name].size, dtype=torch.float64)
            masks[name][list(units)] = 1.0
        return Plan.from_values(structure, masks)


def _scored(model: PreTrainedModel, structure: Structure, batches: Sequence[Batch]) -> list[Batch]:
    """The first batches, up to the limits, in small pieces."""
    pieces: list[Batch] = []
    positions = examples = 0
    for batch in batches:
        size = max(len(value) for value in batch.values())
        positions += counted(model, structure, batch)
        examples += size
        for start in range(0, size, _SCORED_TOGETHER):
            end = start + _SCORED_TOGETHER
            pieces.append({name: value[start:end] if len(value) == size else value for name, value in batch.items()})
        if positions >= SCORED_POSITIONS or examples >= SCORED_EXAMPLES:
            break
    return pieces


def _inner(structure: Structure, units: str | Sequence[UnitKind] | None) -> list[str]:
    """Names of the groups inside blocks that may be cut and have something to cut, from the bottom to the top."""
    chosen = {group.name for group in structure.select(_listed(units)) if group.size}
    names = [block.inner for block in structure.blocks if block.inner in chosen]
    return [name for name in names if name is not None and structure[name].layer is not None]


def _listed(units: str | Sequence[UnitKind] | None) -> str | tuple[UnitKind, ...] | None:
    return units if units is None or isinstance(units, str) else tuple(units)

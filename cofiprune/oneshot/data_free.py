"""One-shot structured pruning: no data, no training, an exact size, in seconds.

Without a teacher a plan is chosen by the weights alone. With one, synthetic inputs run through the model: the
plan is chosen by what they excite, and what is left of every block is refitted to put out what the whole block
put out (`repair`). The refitted weights are kept only if the model's answers come nearer to the teacher's on
synthetic inputs that the fit has not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from cofiprune import accounting
from cofiprune.adapter import structure as structure_of
from cofiprune.compaction import compact, restore
from cofiprune.data.checks import longest_sequence
from cofiprune.data.synthetic import synthetic_inputs
from cofiprune.errors import AdapterError, MaskError, SettingsError, TeacherError
from cofiprune.masking import masks_of
from cofiprune.oneshot.allocation import scores, worth
from cofiprune.oneshot.divergence import Answers, answers, divergence
from cofiprune.oneshot.importance import activation_importance, weight_importance
from cofiprune.oneshot.layerwise import Batch, counted
from cofiprune.oneshot.reconstruction import Repair
from cofiprune.plan import Plan
from cofiprune.selection.arguments import check_fraction
from cofiprune.selection.by_score import select
from cofiprune.selection.reachable import check_target
from cofiprune.selection.target import Target
from cofiprune.structure import Structure, UnitKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[str, float], None]

_WORK = 260_000_000_000
_FEWEST, _MOST = 2048, 6144
"""Samples times parameters of the layers, and bounds on the samples: less than a minute for BERT-base on one core of a
server, seconds for smaller models."""
_BATCH = 8
_LENGTH = 64
"""Tokens of the longest synthetic sequences."""
_HELD_OUT = 4
"""One position in so many, on top of the samples, is for measuring; as many again are enough for importance."""


@dataclass(frozen=True)
class OneShotReport:
    """What came of a one-shot prune."""

    plan: Plan
    """What stays: hard, and of exactly the sparsity asked for, within 0.005."""
    divergence_before: float | None = None
    """Distance of the pruned model's answers from the teacher's on held-out synthetic inputs, before the repair: a KL
    in nats for classes, a mean squared error for scores and states. None without a teacher."""
    divergence_after: float | None = None
    """The same after the repair; equal to it where the repair was rolled back."""

    @property
    def repaired(self) -> bool:
        """Whether weights were changed."""
        return self.divergence_after != self.divergence_before


def prune_without_data(
    model: PreTrainedModel,
    *,
    target_sparsity: float | Target,
    teacher: PreTrainedModel | Literal["self"] | None = None,
    units: str | Sequence[UnitKind] | None = None,
    seed: int = 0,
    samples: int | None = None,
    repair: bool = True,
    on_progress: Progress | None = None,
) -> OneShotReport:
    """Choose what to remove without data, and repair what is left.

    The plan is not carried out: attach masks and set it, or pass it to `compact`. With a teacher, the kept units of
    what was refitted are overwritten in place: the blocks' last projections and, where hidden dimensions go, the norms.
    Everything else, removed units included, stays as it is. The result depends on the weights and the seed alone.

    :param model: without masks attached.
    :param target_sparsity: share of the parameters of the encoder's layers to remove, in (0, 1); or any other target.
    :param teacher: whose answers the pruned model should give; "self" for the model as it is. A teacher of the same
        structure is also what the repair reproduces, block by block; otherwise that is the model as it is.
    :param units: unit kinds that may be removed; None for all that the model has.
    :param samples: positions (tokens, patches or frames) that statistics are taken over, at least 1; more are slower
        and better. None takes 2048 to 6144, fewer for larger models.
    :param repair: whether what is left is refitted, with a teacher.
    :param on_progress: called with the name of the phase and its share done, in [0, 1].
    :raises TargetError: when the target cannot be reached.
    :raises DataError: when inputs cannot be made up for this model, with a teacher.
    """
    structure = structure_of(model)
    target = target_sparsity
    if not isinstance(target, Target):
        target = Target.of(structure, check_fraction(target))
    check_target(structure, target, units)
    parameters = accounting.layer_parameters(structure).exact(structure.sizes)
    samples = _samples(parameters) if samples is None else samples
    _check(model, teacher, samples)
    report = on_progress or (lambda phase, share: None)
    report("importance", 0.0)
    importance = weight_importance(model, structure)
    if teacher is None:
        return OneShotReport(_decided(model, structure, importance, target, units))
    reference = model if isinstance(teacher, str) else teacher
    generator = torch.Generator().manual_seed(seed)
    with _evaluating(model, reference):
        batches = _synthetic(model, structure, samples, generator)
        held_out = _synthetic(model, structure, -(-samples // _HELD_OUT), generator)
        measured = activation_importance(model, structure, batches[: -(-len(batches) // _HELD_OUT)])
        plan = _decided(model, structure, {**importance, **measured}, target, units)
        if not repair:
            return OneShotReport(plan)
        return _repaired(_Pruned(model, structure, plan, reference), batches, held_out, report)


def _decided(
    model: PreTrainedModel,
    structure: Structure,
    importance: Mapping[str, Tensor],
    target: Target,
    units: str | Sequence[UnitKind] | None,
) -> Plan:
    """Choose what stays; where the cost is an estimate, what is decided is measured."""
    ranked, valued = scores(structure, importance, units), worth(structure, importance, units)
    return target.settle(lambda goal: select(structure, ranked, goal, worth=valued), lambda plan: compact(model, plan))


@dataclass(frozen=True)
class _Pruned:
    """A decision that has not been carried out."""

    model: PreTrainedModel
    structure: Structure
    plan: Plan
    teacher: PreTrainedModel

    @property
    def source(self) -> PreTrainedModel:
        """The model whose blocks are reproduced."""
        try:
            theirs = structure_of(self.teacher)
        except AdapterError:
            return self.model
        alike = theirs.family == self.structure.family and theirs.sizes == self.structure.sizes
        return self.teacher if alike else self.model


def _repaired(pruned: _Pruned, batches: Sequence[Batch], held_out: Sequence[Batch], report: Progress) -> OneShotReport:
    """Repair what a plan leaves, and write it into the model if that brings its answers nearer to the teacher's."""
    plan, source = pruned.plan, pruned.source
    hidden = plan.keep.get("hidden")
    theirs = _answers(pruned.model, pruned.teacher, held_out)
    small = compact(pruned.model, plan)
    before = divergence(small, theirs, held_out, hidden=hidden)
    report("repair", 0.0)
    repair = Repair(source, structure_of(source), small, structure_of(small), plan, batches)
    repair.run(lambda share: report("repair", share))
    after = divergence(small, theirs, held_out, hidden=hidden)
    if not after < before:
        return OneShotReport(plan, before, before)
    restore(pruned.model, small, plan)
    return OneShotReport(plan, before, after)


def _answers(model: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Batch]) -> list[Answers]:
    """The teacher's answers, or the model's own where the teacher's have another shape (an encoder's states)."""
    theirs = answers(teacher, batches)
    if teacher is model:
        return theirs
    ours = answers(model, batches[:1])[0]
    same = [part.shape for part in ours] == [part.shape for part in theirs[0]]
    return theirs if same else answers(model, batches)


def _samples(parameters: int) -> int:
    return min(max(_WORK // max(parameters, 1), _FEWEST), _MOST)


def _check(model: PreTrainedModel, teacher: PreTrainedModel | str | None, samples: int) -> None:
    if masks_of(model) is not None:
        raise MaskError("masks are attached to this model already; compact it first, or call masks.detach()")
    if isinstance(teacher, str) and teacher != "self":
        raise TeacherError(f'teacher takes a model, "self" or None, not {teacher!r}')
    if samples < 1:
        raise SettingsError(f"samples is {samples}; statistics need at least 1 position")


def _synthetic(model: PreTrainedModel, structure: Structure, samples: int, generator: torch.Generator) -> list[Batch]:
    """Make up batches with at least so many positions, every other one with padding."""
    limit = longest_sequence(model)
    seq_len = _LENGTH if limit is None else min(_LENGTH, limit)
    batches: list[Batch] = []
    found = 0
    while found < samples:
        padding = len(batches) % 2 == 0
        batch = synthetic_inputs(model, batch_size=_BATCH, seq_len=seq_len, generator=generator, padding=padding)
        batches.append(batch)
        found += counted(model, structure, batch)
    return batches


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the mode of every module as it was afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

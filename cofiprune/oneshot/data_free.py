"""One-shot structured pruning without data: no training, an exact size, in seconds.

Without a teacher a plan is chosen by the weights alone. With one, synthetic inputs run through the model: the
plan is chosen by what they excite, and every block that is left is refitted to the outputs of the dense block
(`reconstruction`). The refitted weights are kept only if the model's outputs come nearer to the teacher's on
synthetic inputs that the fit has not seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cofiprune import accounting
from cofiprune.adapter import structure as structure_of
from cofiprune.compaction.slicing import compacted, write_back
from cofiprune.data.batches import to_model
from cofiprune.data.checks import longest_sequence
from cofiprune.data.synthetic import synthetic_inputs
from cofiprune.data.tasks import class_order, supported_kwargs, task_of
from cofiprune.distillation import logit_loss, predictions
from cofiprune.errors import AdapterError
from cofiprune.hooks import evaluating
from cofiprune.oneshot.importance import activation_importance, scores, weight_importance, worth
from cofiprune.oneshot.layerwise import Batch, first_batches
from cofiprune.oneshot.reconstruction import Reconstruction
from cofiprune.plan import Plan
from cofiprune.selection.by_score import select
from cofiprune.selection.target import Target
from cofiprune.structure import Structure, UnitKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Outputs = tuple[Tensor, ...]

_WORK = 260_000_000_000
_FEWEST, _MOST = 2048, 6144
"""Samples times parameters of the layers, and bounds on the samples: less than a minute for BERT-base on one core of a
server, seconds for smaller models."""
_BATCH = 8
_LENGTH = 64
"""Tokens of the longest synthetic sequences."""
_HELD_OUT = 4
"""One position in so many, on top of the samples, is for measuring; as many again are enough for importance."""


def prune_data_free(
    model: PreTrainedModel,
    structure: Structure,
    target: Target,
    *,
    teacher: PreTrainedModel | None = None,
    units: str | Sequence[UnitKind] | None = None,
    seed: int = 0,
    samples: int | None = None,
    reconstruct: bool = True,
) -> Plan:
    """Choose what to remove without data, and reconstruct what is left.

    The plan is not carried out. With a teacher, the kept units of what was refitted are overwritten in place: the
    blocks' last projections and, where hidden dimensions go, the norms. The outcome depends on weights and seed alone.

    :param model: without masks attached.
    :param target: one that can be reached with the units (`check_target`).
    :param teacher: whose outputs the pruned model should have, which may be the model itself. One of the same structure
        is also what is reconstructed, block by block; otherwise that is the model as it is.
    :param samples: positions (tokens, patches or frames) that statistics are taken over; None for 2048 to 6144, fewer
        for larger models.
    :param reconstruct: whether what is left is refitted, with a teacher.
    :return: what stays; without scales, and within 0.005 of the target.
    :raises DataError: when inputs cannot be made up for this model, with a teacher.
    """
    importance = weight_importance(model, structure)

    def decide() -> Plan:
        ranked, lost = scores(structure, importance, units), worth(structure, importance, units)
        plan_for = partial(select, structure, ranked, worth=lost)
        return target.settle(plan_for, partial(compacted, model, structure))

    if teacher is None:
        return decide()
    if samples is None:
        samples = min(max(_WORK // accounting.layer_parameters(structure).exact(structure.sizes), _FEWEST), _MOST)
    generator = torch.Generator().manual_seed(seed)
    with evaluating(model, teacher):
        batches = _synthetic(model, structure, samples, generator)
        held_out = _synthetic(model, structure, -(-samples // _HELD_OUT), generator)
        importance |= activation_importance(model, structure, batches[: -(-len(batches) // _HELD_OUT)])
        plan = decide()
        if reconstruct:
            small = compacted(model, structure, plan)
            if _comes_nearer(small, plan, teacher, model, structure, batches, held_out):
                write_back(model, structure, small, plan)
    return plan


def _comes_nearer(
    small: PreTrainedModel,
    plan: Plan,
    teacher: PreTrainedModel,
    model: PreTrainedModel,
    structure: Structure,
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
) -> bool:
    """Reconstruct what a plan leaves, and return whether its outputs come nearer to the teacher's."""
    hidden, wanted = plan.keep.get("hidden"), _wanted(model, teacher, held_out)
    before = divergence(small, wanted, held_out, hidden=hidden)
    source = teacher if _same_structure(teacher, structure) else model
    Reconstruction(source, structure, small, plan, batches).run()
    return divergence(small, wanted, held_out, hidden=hidden) < before


def _same_structure(teacher: PreTrainedModel, structure: Structure) -> bool:
    try:
        theirs = structure_of(teacher)
    except AdapterError:
        return False
    return theirs.family == structure.family and theirs.sizes == structure.sizes


def _wanted(model: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Batch]) -> list[Outputs]:
    """Return the teacher's outputs, or the model's own where the teacher's have another shape (an encoder's states)."""
    theirs, (ours,) = outputs_of(teacher, batches, class_order(model, teacher)), outputs_of(model, batches[:1])
    same = [part.shape for part in ours] == [part.shape for part in theirs[0]]
    return theirs if same else outputs_of(model, batches)


def _synthetic(model: PreTrainedModel, structure: Structure, samples: int, generator: torch.Generator) -> list[Batch]:
    """Make up batches with at least so many positions, every other one with padding."""
    limit = longest_sequence(model)
    seq_len = _LENGTH if limit is None else min(_LENGTH, limit)
    made = (
        synthetic_inputs(model, batch_size=_BATCH, seq_len=seq_len, generator=generator, padding=padding)
        for padding in cycle((True, False))
    )
    return first_batches(model, structure, made, samples)[0]


@torch.no_grad()
def outputs_of(model: PreTrainedModel, batches: Sequence[Batch], order: Sequence[int] | None = None) -> list[Outputs]:
    """Return the predictions of a model to each batch, with its classes in an order.

    :raises TeacherError: when its output holds none that are known.
    """
    return [
        predictions(model(**to_model(batch, model), **supported_kwargs(model, return_dict=True)), order)
        for batch in batches
    ]


@torch.no_grad()
def divergence(
    model: PreTrainedModel,
    reference: Sequence[Outputs],
    batches: Sequence[Batch],
    *,
    hidden: Sequence[int] | None = None,
) -> float:
    """Return how far the predictions of a model are from others: 0 where they are equal, infinite for no number.

    The measure is `logit_loss` at temperature 1: a KL in nats for classes and spans, a mean squared error for scores
    and states.

    :param reference: predictions to the same batches.
    :param hidden: the reference's dimension of each of the model's, for an encoder without a head that has fewer.
    """
    kind = task_of(model)
    total = 0.0
    for batch, theirs in zip(batches, reference, strict=True):
        (ours,) = outputs_of(model, [batch])
        theirs = tuple(part.to(mine) for part, mine in zip(theirs, ours, strict=True))
        if kind == "embedding" and hidden is not None:
            theirs = tuple(part[..., list(hidden)] for part in theirs)
        mask = batch.get("attention_mask")
        mask = mask if mask is not None and mask.dim() == 2 else None
        total += float(logit_loss(ours, theirs, temperature=1.0, kind=kind, mask=mask))
    mean = total / max(len(batches), 1)
    return max(mean, 0.0) if math.isfinite(mean) else math.inf  # a KL of next to nothing can round to less

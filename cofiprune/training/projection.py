"""The linear map from student to teacher states: a new one, one fitted to data, or a learned one cut to size."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cofiprune.data.batches import ROWS, Batch
from cofiprune.data.tasks import forward_names, label_names, supported_kwargs
from cofiprune.distillation import hidden_projection
from cofiprune.record import recorded_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BATCHES = 8
_RIDGE = 1e-3


@torch.no_grad()
def fitted_projection(
    student: PreTrainedModel, teacher: PreTrainedModel, batches: Iterable[Batch], device: torch.device
) -> nn.Linear:
    """Return the map that takes the student's last states nearest to the teacher's on a few batches.

    Ridge regression with an intercept in float64. A student of other or fewer dimensions than its teacher has
    no identity to start from.
    """
    training = student.training
    student.train(False)
    labels = {ROWS, *label_names(student)}
    gram: Tensor | None = None
    for batch in itertools.islice(batches, _BATCHES):
        inputs = {name: value.to(device) for name, value in batch.items() if name not in labels}
        ours = student(
            **inputs, **supported_kwargs(student, output_hidden_states=True, return_dict=True)
        ).hidden_states[-1]
        read = {name: value for name, value in inputs.items() if name in forward_names(teacher)}
        theirs = teacher(
            **read, **supported_kwargs(teacher, output_hidden_states=True, return_dict=True)
        ).hidden_states[-1]
        mask = inputs.get("attention_mask")
        if mask is not None and mask.shape == ours.shape[:2]:
            ours, theirs = ours[mask.bool()], theirs[mask.bool()]
        ours, theirs = ours.flatten(0, -2).double(), theirs.flatten(0, -2).double()
        joined = torch.cat([ours, ours.new_ones(len(ours), 1), theirs], dim=1)
        gram = joined.T @ joined if gram is None else gram + joined.T @ joined
    student.train(training)
    assert gram is not None
    width = hidden_width(student)
    inner, cross = gram[: width + 1, : width + 1], gram[: width + 1, width + 1 :]
    ridge = _RIDGE * inner.diagonal().mean() * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
    solution = torch.linalg.solve(inner + ridge, cross).T.float()
    projection = nn.Linear(width, hidden_width(teacher)).to(device)
    projection.weight.copy_(solution[:, :-1])
    projection.bias.copy_(solution[:, -1])
    return projection


def cut_projection(projection: nn.Linear, keep: tuple[int, ...]) -> nn.Linear:
    """Return a learned map for a student that was compacted to some hidden dimensions."""
    small = hidden_projection(len(keep), projection.out_features, keep=None)
    with torch.no_grad():
        small.weight.copy_(projection.weight[:, list(keep)])
        small.bias.copy_(projection.bias)
    return small.to(projection.weight.device)


def hidden_width(model: PreTrainedModel) -> int:
    """Width of a model's hidden states, compacted or not; its family need not have an adapter."""
    recorded = recorded_sizes(model.config) or {}
    return int(recorded.get("hidden", model.config.hidden_size))

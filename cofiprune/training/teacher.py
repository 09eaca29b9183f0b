"""A teacher that remembers what it put out, and one that is not there: its outputs stand in the rows.

A teacher's forward pass is a third of the cost of a training step, and most of it once the student is small. Its
outputs for a row depend on the row alone (it is in evaluation mode), so that they are kept from the first epoch on.
Rows that a collator of the user's makes, and images, are computed anew each time.

Shapes: B examples, T tokens of the batch, t tokens of a row, S teacher layers distilled, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cofiprune.data.cached import EMBEDDING, HIDDEN, LOGITS
from cofiprune.data.tasks import Task, forward_names, supported_kwargs
from cofiprune.distillation import predictions
from cofiprune.parts import encoder_config
from cofiprune.record import sizes_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Outputs = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
"""Of a teacher for a batch: its predictions, and the states [B, T, H] of its S chosen layers."""


@dataclass(eq=False)
class Teacher:
    """Runs a teacher, or remembers what it put out."""

    model: PreTrainedModel
    layers: Sequence[int]
    """The S layers whose outputs are wanted."""
    token_axis: bool
    """Whether the predictions have one: [B, T, ...] instead of [B, ...]."""
    memory: int
    """Bytes that it may remember; 0 for none."""
    order: Sequence[int] | None = None
    """The place in its predictions of each class of the student; None where that is the student's."""
    used: int = 0
    _known: dict[int, tuple[list[Tensor], list[Tensor]]] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Of its states."""
        return hidden_width(self.model)

    @property
    def num_layers(self) -> int | None:
        return int(encoder_config(self.model).num_hidden_layers)

    def last_states(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the states of its last layer for a batch on its device, without labels: [B, T, H]."""
        return last_states(self.model, {name: value for name, value in batch.items() if name in self.reads})

    def __post_init__(self) -> None:
        self.reads = set(forward_names(self.model))
        self.options = supported_kwargs(self.model, output_hidden_states=bool(self.layers), return_dict=True)
        self.depth = int(encoder_config(self.model).num_hidden_layers) if self.layers else 0

    def outputs(self, inputs: Mapping[str, Tensor], rows: Tensor | None) -> Outputs:
        """Return the teacher's outputs for a batch.

        :param inputs: what the model reads, without labels.
        :param rows: [B] numbers of the rows, on the CPU, when the same number always means the same row.
        """
        mask = inputs.get("attention_mask")
        if rows is None or not self.memory or mask is None or mask.dim() != 2:
            return self._run(inputs)
        if self.knows(rows):
            return self._recall(rows.tolist(), mask.shape[1])
        outputs = self._run(inputs)
        # States of an image beside the text are not cut to the length of a row.
        if self.used < self.memory and all(state.shape[1] == mask.shape[1] for state in outputs[1]):
            self._remember(rows.tolist(), outputs, mask)
        return outputs

    def knows(self, rows: Tensor) -> bool:
        """Return whether the outputs for all these rows are remembered."""
        return all(number in self._known for number in rows.tolist())

    @torch.no_grad()
    def _run(self, inputs: Mapping[str, Tensor]) -> Outputs:
        inputs = {name: value for name, value in inputs.items() if name in self.reads}
        output = self.model(**inputs, **self.options)
        states = tuple(
            output.hidden_states[layer + 1].flatten(1, -2) for layer in self.layers
        )  # an image's rows joined
        return tuple(part.detach() for part in predictions(output, self.order)), states

    def _remember(self, numbers: list[int], outputs: Outputs, mask: Tensor) -> None:
        position = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        lengths = (mask.ne(0) * position).amax(1).tolist()
        predicted, chosen = outputs
        for index, (number, length) in enumerate(zip(numbers, lengths, strict=True)):
            parts = [part[index, :length].clone() if self.token_axis else part[index].clone() for part in predicted]
            # What an encoder without a head predicts are the states of its last layer: they are kept once.
            own = {part.data_ptr(): copied for part, copied in zip(predicted, parts, strict=True)}
            states = [
                own[state.data_ptr()] if state.data_ptr() in own else state[index, :length].clone() for state in chosen
            ]
            self._known[number] = (parts, states)
            self.used += sum(part.nbytes for part in {id(part): part for part in (*parts, *states)}.values())

    def _recall(self, numbers: list[int], width: int) -> Outputs:
        known = [self._known[number] for number in numbers]
        parts = tuple(
            _stack(rows, width) if self.token_axis else torch.stack(rows)
            for rows in ([row[index] for row, _ in known] for index in range(len(known[0][0])))
        )
        states = tuple(_stack([row[index] for _, row in known], width) for index in range(len(self.layers)))
        return parts, states


@dataclass(eq=False)
class CachedTeacher:
    """Reads what a teacher has put out in the rows of a batch; its states are those of as many layers as stand there.

    It is evenly spread layers up to the last that are cached, so that they are taken for all layers that it has.
    """

    task: Task
    states: bool
    """Whether states are wanted."""
    example: Mapping[str, Tensor]
    """A batch."""

    def __post_init__(self) -> None:
        hidden = self.example.get(HIDDEN) if self.states else None
        self.layers: Sequence[int] = range(0 if hidden is None else hidden.shape[1] if hidden.dim() == 4 else 1)
        self.depth = len(self.layers)
        self.width = 0 if hidden is None else hidden.shape[-1]
        self.num_layers: int | None = None

    def outputs(self, inputs: Mapping[str, Tensor], rows: Tensor | None) -> Outputs:
        """Return what stands in a batch, as `Teacher.outputs` does; no predictions where there are states alone."""
        states = tuple(self._hidden(inputs)) if self.layers else ()
        if EMBEDDING in inputs:
            return (inputs[EMBEDDING],), states
        if self.task == "embedding" and HIDDEN in inputs:
            return (self._hidden(inputs)[-1],), states
        if LOGITS not in inputs:
            return (), states
        logits = inputs[LOGITS]
        if self.task == "question-answering":
            return tuple(logits.unbind(-1)), states
        return (logits.unsqueeze(-1) if logits.dim() == 1 else logits,), states

    def last_states(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the states of the last layer: [B, T, H]."""
        return self._hidden(batch)[-1]

    def _hidden(self, batch: Mapping[str, Tensor]) -> Sequence[Tensor]:
        hidden = batch[HIDDEN]
        return hidden.unbind(1) if hidden.dim() == 4 else [hidden]


def last_states(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the states of a model's last layer: [B, T, H]."""
    options = supported_kwargs(model, output_hidden_states=True, return_dict=True)
    states: Tensor = model(**inputs, **options).hidden_states[-1]
    return states


def hidden_width(model: PreTrainedModel) -> int:
    """Width of a model's hidden states, compacted or not; its family need not have an adapter."""
    recorded = sizes_of(model) or {}
    return int(recorded.get("hidden", getattr(encoder_config(model), "hidden_size", 0)))


def _stack(rows: list[Tensor], width: int) -> Tensor:
    """Pad rows [t, ...] with zeros to [B, width, ...]."""
    out = rows[0].new_zeros(len(rows), width, *rows[0].shape[1:])
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return out

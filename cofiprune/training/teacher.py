"""The teacher's answers: computed once per row where they fit into memory, since they never change.

A teacher's forward is a third of the cost of a training step, and most of it once the student is
small. Its answers to a row depend on the row alone (it is in evaluation mode), so that they are kept
from the first epoch on. Rows that a collator of the user's makes, and images, are asked anew each time.

Shapes: B examples, T tokens of the batch, t tokens of a row, S teacher layers distilled, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cofiprune.data.tasks import forward_names, supported_kwargs
from cofiprune.distillation import predictions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Answers:
    """What a teacher says to a batch."""

    predictions: tuple[Tensor, ...]
    """As `cofiprune.distillation.predictions` returns them."""
    states: tuple[Tensor, ...]
    """S of [B, T, H]: outputs of the chosen layers."""


class Teacher:
    """Asks a teacher, or its memory."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[int], *, token_axis: bool, memory: int) -> None:
        """Set up a memory.

        :param layers: the S layers whose outputs are wanted.
        :param token_axis: whether the predictions have one: [B, T, ...] instead of [B, ...].
        :param memory: bytes that it may grow to; 0 for none.
        """
        self.token_axis = token_axis
        self.reads = set(forward_names(model))
        self.options = supported_kwargs(model, output_hidden_states=bool(layers), return_dict=True)
        self.model = model
        self.layers = tuple(layers)
        self.depth = int(model.config.num_hidden_layers)
        self.memory = memory
        self.used = 0
        self._known: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    def answer(self, inputs: Mapping[str, Tensor], rows: Tensor | None) -> Answers:
        """Return the teacher's answers to a batch.

        :param inputs: what the model reads, without labels.
        :param rows: [B] numbers of the rows, on the CPU, when the same number always means the same row.
        """
        mask = inputs.get("attention_mask")
        if rows is None or not self.memory or mask is None or mask.dim() != 2:
            return self._ask(inputs)
        numbers = rows.tolist()
        if self.knows(rows):
            return self._recall(numbers, mask)
        answers = self._ask(inputs)
        if self.used < self.memory:
            self._remember(numbers, answers, mask)
        return answers

    def knows(self, rows: Tensor) -> bool:
        """Whether the answers to all these rows are remembered."""
        return all(number in self._known for number in rows.tolist())

    @torch.no_grad()
    def _ask(self, inputs: Mapping[str, Tensor]) -> Answers:
        inputs = {name: value for name, value in inputs.items() if name in self.reads}
        output = self.model(**inputs, **self.options)
        states = tuple(output.hidden_states[layer + 1] for layer in self.layers)
        return Answers(tuple(part.detach() for part in predictions(output)), states)

    def _remember(self, numbers: list[int], answers: Answers, mask: Tensor) -> None:
        position = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        lengths = (mask.ne(0) * position).amax(1).tolist()
        for index, (number, length) in enumerate(zip(numbers, lengths, strict=True)):
            parts = [
                part[index, :length].clone() if self.token_axis else part[index].clone() for part in answers.predictions
            ]
            states = [state[index, :length].clone() for state in answers.states]
            self._known[number] = (parts, states)
            self.used += sum(part.numel() * part.element_size() for part in (*parts, *states))

    def _recall(self, numbers: list[int], mask: Tensor) -> Answers:
        width = mask.shape[1]
        known = [self._known[number] for number in numbers]
        parts = tuple(
            _stack(rows, width) if self.token_axis else torch.stack(rows)
            for rows in ([row[index] for row, _ in known] for index in range(len(known[0][0])))
        )
        states = tuple(_stack([row[index] for _, row in known], width) for index in range(len(self.layers)))
        return Answers(parts, states)


def _stack(rows: list[Tensor], width: int) -> Tensor:
    """Pad rows [t, ...] with zeros to [B, width, ...]."""
    out = rows[0].new_zeros(len(rows), width, *rows[0].shape[1:])
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return out

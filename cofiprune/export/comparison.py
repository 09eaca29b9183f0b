"""Answers of a file beside those of the model that it was made from, on rows and on synthetic inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cofiprune.data.batches import Batch, Batches
from cofiprune.data.checks import longest_sequence
from cofiprune.data.synthetic import synthetic_inputs
from cofiprune.data.tasks import forward_names, main_input
from cofiprune.export.graph import tensors
from cofiprune.measure.answers import Answer
from cofiprune.parts import encoder_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXAMPLE = (2, 8)
"""Numbers of rows and tokens that are traced."""
_SHAPES = ((1, 5), (3, 12), (2, 40))
"""Others, on which the file is compared."""
_ROWS = (32, 24)
_BATCHES = 8
"""Batches of the user's rows whose numbers are compared; all rows are scored."""


def torch_answers(whole: nn.Module, model: PreTrainedModel) -> Answer:
    """Return a model as what answers batches; of their columns it reads those that are exported."""
    names = set(example(model, *EXAMPLE))

    def answer(batch: Batch) -> Mapping[str, Tensor]:
        with torch.no_grad():
            return tensors(whole(**{name: value for name, value in batch.items() if name in names}))

    return answer


def example(model: PreTrainedModel, rows: int, tokens: int) -> dict[str, Tensor]:
    """Make synthetic inputs with padding, and with both token types where a model tells them apart."""
    limit = None
    if main_input(model) == "input_ids":
        limit = longest_sequence(model) or getattr(encoder_config(model), "max_position_embeddings", None)
    generator = torch.Generator().manual_seed(0)
    length = min(tokens, limit or tokens)
    inputs = synthetic_inputs(model, batch_size=rows, seq_len=length, generator=generator, padding=True)
    types = getattr(model.config, "type_vocab_size", 0) or 0
    if types > 1 and "token_type_ids" in forward_names(model):
        inputs["token_type_ids"] = torch.randint(2, inputs["input_ids"].shape, generator=generator)
    return inputs


def synthetic_rows(model: PreTrainedModel) -> list[Batch]:
    """Return synthetic inputs row by row, to score on where there are no others."""
    inputs = example(model, *_ROWS)
    return [{name: value[index] for name, value in inputs.items()} for index in range(_ROWS[0])]


def compared_batches(model: PreTrainedModel, batches: Batches | None) -> list[Batch]:
    """Return synthetic inputs of several shapes, and some of the user's batches."""
    found = [example(model, rows, tokens) for rows, tokens in _SHAPES]
    if batches is not None:
        found += islice(batches, 0, None, -(-len(batches) // _BATCHES))
    return found


@dataclass(frozen=True)
class Expected:
    """What a model answers, for files to be compared with."""

    batches: list[Batch]
    answers: list[Mapping[str, Tensor]]

    @classmethod
    def of(cls, reference: Answer, batches: list[Batch]) -> Expected:
        return cls(batches, [reference(batch) for batch in batches])

    @property
    def largest(self) -> float:
        """Largest number among the answers, by its size."""
        return max(float(value.abs().max()) for answer in self.answers for value in answer.values())

    def difference(self, answer: Answer) -> float:
        """Return the largest difference of any number; what stands at padding means nothing, and is left out."""
        return max(
            _difference(one, other, batch)
            for batch, expected in zip(self.batches, self.answers, strict=True)
            for one, other in _pairs(expected, answer(batch))
        )


def _pairs(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    return ((value, found[name]) for name, value in expected.items())


def _difference(one: Tensor, other: Tensor, batch: Batch) -> float:
    if one.shape != other.shape:
        return float("nan")
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() > 1 and one.shape[: mask.dim()] == mask.shape:
        one, other = one[mask.bool()], other[mask.bool()]
    return float((one - other).abs().max())

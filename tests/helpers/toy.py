"""A task that a toy model learns in seconds, rows for every kind of head, and what its models answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import BertConfig

import cofiprune
from cofiprune.hooks import evaluating

CLS, ONE, ZERO, WORDS, VOCABULARY = 2, 5, 6, 7, 40
INPUTS = {"input_ids": torch.tensor([[2, 5, 9, 11, 0, 0], [2, 8, 6, 7, 30, 12]])}
INPUTS["attention_mask"] = (INPUTS["input_ids"] != 0).long()


def config(**changes: Any) -> BertConfig:
    """Small enough for a step of a few milliseconds, large enough that most targets can be reached."""
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 16,
    }  # fmt: skip
    return BertConfig(**{**settings, **changes})


def bert(name: str = "BertForSequenceClassification", *, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return getattr(transformers, name)(config(**changes))


def rows(count: int = 48, *, seed: int = 0, labels: Callable[[list[int]], Any] | None = None) -> list[dict[str, Any]]:
    """Rows of 4 to 11 tokens; the class is said by one token, at any place but the first."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    found = []
    for index in range(count):
        ids = [CLS, *(draw(WORDS, VOCABULARY) for _ in range(draw(2, 10)))]
        ids.insert(draw(1, len(ids) + 1), (ZERO, ONE)[index % 2])
        found.append({"input_ids": ids, **({"labels": index % 2} if labels is None else labels(ids))})
    return found


def unlabelled(count: int = 48, *, seed: int = 0) -> list[dict[str, Any]]:
    return rows(count, seed=seed, labels=lambda ids: {})


def spans(ids: list[int]) -> dict[str, int]:
    """Labels of a question's answer."""
    return {"start_positions": 1, "end_positions": len(ids) - 1}


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows as one padded batch."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    labels = {"labels": torch.tensor([row["labels"] for row in rows])} if "labels" in rows[0] else {}
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), **labels}


def answers(model: Any, inputs: dict[str, Tensor] = INPUTS) -> list[Tensor]:
    """All that a model predicts, in evaluation mode."""
    with evaluating(model), torch.no_grad():
        found = model(**inputs)
    return [value for name, value in found.items() if isinstance(value, Tensor) and name != "loss"]


def logits(model: Any, inputs: dict[str, Tensor] = INPUTS) -> Tensor:
    return answers(model, inputs)[0]


def assert_masked_is_compacted(model: Any, small: Any = None, inputs: dict[str, Tensor] = INPUTS) -> None:
    """A model under its masks answers as what is left of it, but for removed dimensions of its states."""
    small = cofiprune.compact(model) if small is None else small
    for masked, compacted in zip(answers(model, inputs), answers(small, inputs), strict=True):
        assert masked.shape[:-1] == compacted.shape[:-1]
        if masked.shape == compacted.shape:
            assert (masked - compacted).abs().max() < 1e-5


def with_checkpointing(model: Any, *, reentrant: bool = False) -> Any:
    """A model that computes activations again in its backward pass."""
    # Renamed in transformers 5.23, where the old name warns.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    return model


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in history]

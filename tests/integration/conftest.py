"""A task that a toy model learns in seconds, and rows for every kind of head."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from cofiprune.structure import Structure

CLS, ONE, ZERO, WORDS, VOCABULARY = 2, 5, 6, 7, 40


def config(**changes: Any) -> BertConfig:
    """Small enough for a step of a few milliseconds, large enough that most targets can be reached."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 16,
    }
    return BertConfig(**{**settings, **changes})


def bert(cls: type = BertForSequenceClassification, *, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return cls(config(**changes))


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


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def is_unchanged(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[name], value) for name, value in before.items())


def parameters_of_layers(model: torch.nn.Module, structure: Structure) -> int:
    """Counted one by one, independently of the accounting."""
    inside = tuple(f"{path}." for path in structure.layers)
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith(inside))


@dataclass(frozen=True)
class Toy:
    config = staticmethod(config)
    bert = staticmethod(bert)
    rows = staticmethod(rows)
    snapshot = staticmethod(snapshot)
    is_unchanged = staticmethod(is_unchanged)
    parameters_of_layers = staticmethod(parameters_of_layers)
    teacher: Any

    def student(self) -> Any:
        """A copy of the fine-tuned teacher: where pruning begins."""
        return copy.deepcopy(self.teacher)


@pytest.fixture(scope="session")
def toy() -> Toy:
    """Models and rows of the task, and a teacher that has learned it."""
    import cofiprune

    teacher = bert()
    torch.manual_seed(0)
    cofiprune.finetune(teacher, rows(192, seed=1), epochs=8, learning_rate=3e-3, batch_size=16, progress=False)
    return Toy(teacher.eval())

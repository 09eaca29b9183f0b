"""Small models that the tests share."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from cofiprune import Adapter, MaskRegistry, register_adapter
from cofiprune import adapter as adapters
from cofiprune.conformance import specimens

SIZES: Mapping[str, int] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 34,
    "vocab_size": 40,
    "max_position_embeddings": 32,
}

Build = Callable[..., PreTrainedModel]
Batch = dict[str, Tensor]


@pytest.fixture(scope="session")
def build() -> Build:
    """Build a small random model: `build("BertForMaskedLM", num_hidden_layers=3)`."""

    def new(name: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **settings: Any) -> PreTrainedModel:
        cls = getattr(transformers, name)
        config = cls.config_class(**{**SIZES, **settings})
        generator = torch.Generator().manual_seed(seed)
        return specimens.specimen(cls(config), generator).to(dtype)

    return new


@pytest.fixture(scope="session")
def batch_of() -> Callable[..., Batch]:
    """Make three examples of different lengths for a model: `batch_of(model)`."""

    def new(model: PreTrainedModel, seed: int = 0) -> Batch:
        return specimens.inputs(model, torch.Generator().manual_seed(seed))

    return new


@pytest.fixture(scope="session")
def randomise() -> Callable[..., None]:
    """Set attached masks to random values: `randomise(masks, fractional=True)`."""

    def change(masks: MaskRegistry, *, fractional: bool = False, seed: int = 0, blocks: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name in masks:
            if blocks or len(masks[name]) > 1:
                masks[name] = specimens.random_values(len(masks[name]), generator, fractional=fractional)

    return change


@pytest.fixture(scope="module", autouse=True)
def _what_was_imported_is_not_collected() -> None:
    # Each run ends with a collection of garbage, which takes longer than the run where it looks through all libraries.
    gc.collect()
    gc.freeze()


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[Adapter], None]:
    """`cofiprune.register_adapter` until the end of a test."""
    monkeypatch.setattr("cofiprune.adapter._registered", dict(adapters._registered))
    return register_adapter


@pytest.fixture
def started_by_hand() -> Iterator[None]:
    """Signals act as in a program that was started by hand; jobs in the background of a script ignore Ctrl-C."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)

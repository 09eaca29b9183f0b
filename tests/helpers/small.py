"""Small models, their inputs, and the questions that many tests ask of them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import BertConfig, PreTrainedModel

import cofiprune
from cofiprune import MaskRegistry, accounting
from cofiprune.conformance import specimens
from cofiprune.data.synthetic import synthetic_inputs

SIZES: Mapping[str, int] = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 34, "vocab_size": 40,
    "max_position_embeddings": 32,
}  # fmt: skip

Batch = dict[str, Tensor]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(name: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random model of which no part is trivial: `build("BertForMaskedLM", num_hidden_layers=3)`."""
    cls = getattr(transformers, name)
    return specimens.specimen(cls(cls.config_class(**{**SIZES, **settings})), rng(seed)).to(dtype)


def bert(name: str = "BertForSequenceClassification", *, seed: int = 0, **settings: Any) -> Any:
    """A BERT as transformers initialises it."""
    torch.manual_seed(seed)
    return getattr(transformers, name)(BertConfig(**{**SIZES, **settings})).eval()


def batch_of(model: PreTrainedModel, seed: int = 0) -> Batch:
    """Three examples of different lengths for a model."""
    return specimens.inputs(model, rng(seed))


def padded_batches(model: PreTrainedModel, count: int = 4, seed: int = 9) -> list[Batch]:
    """Batches of 8 examples of up to 20 tokens."""
    generator = rng(seed)
    return [synthetic_inputs(model, batch_size=8, seq_len=20, generator=generator, padding=True) for _ in range(count)]


def padded(batch: Batch, width: int, fill: int) -> Batch:
    """The same tokens in longer rows, with an id of one's own where nothing is read."""
    more = (0, width - batch["input_ids"].shape[1])
    mask = torch.nn.functional.pad(batch["attention_mask"], more)
    return {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], more).masked_fill(mask == 0, fill),
        "attention_mask": mask,
    }


def randomise(masks: MaskRegistry, *, fractional: bool = False, seed: int = 0, blocks: bool = False) -> None:
    """Set attached masks to random values; those of whole blocks only if asked."""
    generator = rng(seed)
    for name in masks:
        if blocks or len(masks[name]) > 1:
            masks[name] = specimens.random_values(len(masks[name]), generator, fractional=fractional)


def logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    return specimens.outputs(model, batch)["logits"]


def cost_of(model: PreTrainedModel) -> tuple[cofiprune.structure.Structure, accounting.Cost]:
    """Its structure, and what counts the parameters of its layers."""
    structure = cofiprune.structure(model)
    return structure, accounting.layer_parameters(structure)


def parameters_of_layers(model: torch.nn.Module, structure: Any) -> int:
    """Counted one by one, independently of the accounting."""
    inside = tuple(f"{path}." for path in structure.layers)
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith(inside))


def snapshot(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def is_unchanged(model: torch.nn.Module, before: Mapping[str, Tensor]) -> bool:
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[name], value) for name, value in before.items())


def trace(model: Any) -> dict[str, Any]:
    """What a function that only reads must not change."""
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    return {
        "modes": {name: module.training for name, module in modules.items()},
        "hooks": {name: _hooks(module) for name, module in modules.items()},
        "attributes": {name: sorted(module.__dict__) for name, module in modules.items()},
        "classes": {name: type(module) for name, module in modules.items()},
        "gradients": {name: (id(p.grad), p.grad.sum().item()) for name, p in parameters.items() if p.grad is not None},
        "learning": {name: p.requires_grad for name, p in parameters.items()},
        "weights": {name: (id(p), p._version, p.double().nan_to_num().sum().item()) for name, p in parameters.items()},
        "buffers": {name: value.double().sum().item() for name, value in model.named_buffers()},
        # A loss on labels makes transformers note which one it took.
        "config": {name: value for name, value in model.config.to_dict().items() if name != "problem_type"},
        "torch's random state": torch.get_rng_state().tolist(),
        "numpy's random state": str(np.random.get_state()),
        "python's random state": random.getstate(),
        "gradients are on": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
    }


def _hooks(module: torch.nn.Module) -> list[tuple[int, ...]]:
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return [tuple(map(id, hooks.values())) for hooks in kinds]


def assert_no_trace(model: torch.nn.Module, before: dict[str, Any]) -> None:
    after = trace(model)
    for name, value in before.items():
        assert after[name] == value, name

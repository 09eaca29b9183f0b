"""Functions that only read leave a model, and the random state of the program, as they were."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, SplinterConfig, SplinterModel

import cofiprune
from cofiprune import MaskRegistry, Plan
from cofiprune.conformance.specimens import inputs
from small import build

ROWS = [{"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "labels": 1}]


def _attach_and_detach(model: PreTrainedModel) -> None:
    with cofiprune.attach(model) as masks:
        masks["layers.0.ffn"] = [0]


READS: dict[str, Callable[[Any], object]] = {
    "structure": cofiprune.structure,
    "adapter_for": cofiprune.adapter_for,
    "check_adapter": lambda model: cofiprune.check_adapter(model, units="layer", batch=_batch(model)),
    "summary": cofiprune.summary,
    "benchmark": lambda model: cofiprune.benchmark(model, batch_size=1, seq_len=8, runs=1),
    "evaluate": lambda model: cofiprune.evaluate(model, ROWS),
    "compact": cofiprune.compact,
    "compact, fused": lambda model: cofiprune.compact(model, fuse=True),
    "attach and detach": _attach_and_detach,
}
READS_OF_MASKS: dict[str, Callable[[MaskRegistry], object]] = {
    "Plan.from_masks": Plan.from_masks,
    "sparsity": lambda masks: (masks.sparsity(), masks.model_sparsity()),
    "mapping": lambda masks: ("layers.9.heads" in masks, masks.get("layers.9.heads"), dict(masks), repr(masks)),
}


@pytest.fixture(params=["declared", "derived"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A model in the middle of somebody's training: dropout, gradients, hooks, a frozen part, parts in eval mode."""
    if request.param == "declared":
        model = build("BertForSequenceClassification", dtype=torch.float32, problem_type="single_label_classification")
    else:
        # Another initializer_range than other tests have, so that its table is derived here.
        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 34}
        config = SplinterConfig(vocab_size=120, question_token_id=104, initializer_range=random.random(), **sizes)
        model = SplinterModel(config)
    model.train()
    for name, module in model.named_modules():
        if name.endswith((".embeddings", "layer.0.attention", "layer.1.output.dropout")):
            module.eval()
        module.register_forward_hook(lambda module, args, output: None)
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.5)
        parameter.requires_grad_(index % 3 > 0)
    return model


def _batch(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return dict(inputs(model, torch.Generator().manual_seed(0)))


def trace(model: PreTrainedModel) -> dict[str, Any]:
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
        "weights": {name: (id(p), p._version, p.sum().item()) for name, p in parameters.items()},
        "buffers": {name: value.double().sum().item() for name, value in model.named_buffers()},
        "config": model.config.to_dict(),
        "torch's random state": torch.get_rng_state().tolist(),
        "numpy's random state": str(np.random.get_state()),
        "python's random state": random.getstate(),
        "gradients are on": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
    }


def _hooks(module: nn.Module) -> list[tuple[int, ...]]:
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return [tuple(map(id, hooks.values())) for hooks in kinds]


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name, value in before.items():
        assert after[name] == value, name


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_a_function_that_reads_a_model(model: PreTrainedModel, read: Callable[[Any], object], request: Any) -> None:
    if read is READS["evaluate"] and "derived" in request.node.callspec.id:
        pytest.skip("its task has no metrics")
    before = trace(model)
    read(model)
    assert_unchanged(before, trace(model))


@pytest.mark.parametrize("read", READS_OF_MASKS.values(), ids=READS_OF_MASKS.keys())
def test_a_function_that_reads_masks(model: PreTrainedModel, read: Callable[[MaskRegistry], object]) -> None:
    with cofiprune.attach(model) as masks:
        masks["layers.0.heads"] = [0, 1, 0.5, 1]
        before = trace(model)
        read(masks)
        assert_unchanged(before, trace(model))

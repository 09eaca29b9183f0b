"""Functions that only read leave a model, and the random state of the program, as they were."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, SplinterConfig, SplinterModel

import cofiprune
from cofiprune import MaskRegistry, Plan
from small import assert_no_trace, batch_of, build, trace

ROWS = [{"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "labels": 1}]


def _attach_and_detach(model: PreTrainedModel) -> None:
    with cofiprune.attach(model) as masks:
        masks["layers.0.ffn"] = [0]


READS: dict[str, Callable[[Any], object]] = {
    "structure": cofiprune.structure,
    "adapter_for": cofiprune.adapter_for,
    "check_adapter": lambda model: cofiprune.check_adapter(model, units="layer", batch=batch_of(model)),
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


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_a_function_that_reads_a_model(model: PreTrainedModel, read: Callable[[Any], object], request: Any) -> None:
    if read is READS["evaluate"] and "derived" in request.node.callspec.id:
        pytest.skip("its task has no metrics")
    before = trace(model)
    read(model)
    assert_no_trace(model, before)


@pytest.mark.parametrize("read", READS_OF_MASKS.values(), ids=READS_OF_MASKS.keys())
def test_a_function_that_reads_masks(model: PreTrainedModel, read: Callable[[MaskRegistry], object]) -> None:
    with cofiprune.attach(model) as masks:
        masks["layers.0.heads"] = [0, 1, 0.5, 1]
        before = trace(model)
        read(masks)
        assert_no_trace(model, before)

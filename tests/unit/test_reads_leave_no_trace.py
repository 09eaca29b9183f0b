"""Functions that only read leave a model, and the random state of the program, as they were."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, SplinterConfig, SplinterModel, Trainer, TrainingArguments

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


def _noisy(rows: list[Any]) -> dict[str, torch.Tensor]:
    random.random(), np.random.rand(), torch.rand(1)
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def _trained(model: PreTrainedModel, folder: Path, callback: cofiprune.PruningCallback) -> None:
    """Train with a callback, and make sure that none of its events draws from the global generators."""
    arguments = TrainingArguments(str(folder), max_steps=6, use_cpu=True, report_to=[], save_strategy="no")
    rows = ROWS * 32
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=_noisy, callbacks=[callback])
    for event in [name for name in dir(callback) if name.startswith("on_")]:
        setattr(callback, event, partial(_watched, getattr(callback, event)))
    trainer.train()


def _watched(handler: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    before = _random_state()
    handler(*args, **kwargs)
    assert _random_state() == before


def _random_state() -> tuple[Any, ...]:
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


QUIET = {"progress": False, "epochs": 1, "batch_size": 8}
RUNS: dict[str, Callable[[Any, Path], object]] = {
    "prune": lambda model, folder: cofiprune.prune(
        model, ROWS * 32, target_sparsity=0.5, data_collator=_noisy, output_dir=folder, **QUIET
    ),
    "prune to several targets": lambda model, folder: cofiprune.prune(
        model, ROWS * 32, target_sparsity=[0.3, 0.5], teacher="self", **QUIET
    ),
    "prune without data": lambda model, folder: cofiprune.prune(model, target_sparsity=0.5),
    "finetune": lambda model, folder: cofiprune.finetune(model, ROWS * 32, data_collator=_noisy, **QUIET),
    "evaluate": lambda model, folder: cofiprune.evaluate(
        model, ROWS * 8, data_collator=_noisy, compute_metrics=lambda found: {"drawn": np.random.rand()}
    ),
}


@pytest.mark.filterwarnings("ignore:pruning without data")
@pytest.mark.parametrize("how", RUNS.values(), ids=RUNS.keys())
def test_a_run_is_seeded_by_its_own_setting(how: Callable[[Any, Path], object], tmp_path: Path) -> None:
    model = build("BertForSequenceClassification", dtype=torch.float32, problem_type="single_label_classification")
    before = _random_state()
    how(model, tmp_path)
    assert _random_state() == before


@pytest.mark.parametrize("teacher", [None, "self"])
def test_a_callback_leaves_the_random_state_to_the_trainer(teacher: Any, tmp_path: Path) -> None:
    model = build("BertForSequenceClassification", dtype=torch.float32, problem_type="single_label_classification")
    _trained(model, tmp_path, cofiprune.PruningCallback(0.5, teacher))

"""What training steps cost beside plain fine-tuning steps of the same model, in turn in one process."""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import cofiprune

pytestmark = pytest.mark.bench

BATCH, LENGTH, BATCHES, ROUNDS = 32, 64, 6, 3
GEOMETRY = {
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
"""MiniLM-L6."""


def rows(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (count, LENGTH), generator=generator).tolist()
    return [{"input_ids": row, "labels": index % 2} for index, row in enumerate(ids)]


def plain_steps(model: BertForSequenceClassification, data: list[dict[str, Any]]) -> list[float]:
    """Seconds of the steps of a plain training loop: forward, backward, AdamW."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embeddings" not in name or "LayerNorm" in name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    model.train()
    found = []
    for start in range(0, len(data), BATCH):
        part = data[start : start + BATCH]
        batch = {name: torch.tensor([row[name] for row in part]) for name in ("input_ids", "labels")}
        begun = time.perf_counter()
        model(**batch, attention_mask=torch.ones(len(part), LENGTH, dtype=torch.long)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(time.perf_counter() - begun)
    return found


def steps_of(history: list[dict[str, Any]]) -> list[float]:
    """Seconds from one logged step to the next."""
    seconds = [entry["seconds"] for entry in history if "loss" in entry]
    return [after - before for before, after in itertools.pairwise(seconds)]


def finetuned(model: BertForSequenceClassification, data: list[dict[str, Any]], **more: Any) -> list[float]:
    settings = {"batch_size": BATCH, "logging_steps": 1, "progress": False, "train_embeddings": False, "epochs": 1}
    return steps_of(cofiprune.finetune(model, data, **{**settings, **more}).history)


def gated(model: BertForSequenceClassification, data: list[dict[str, Any]], teacher: Any) -> list[float]:
    result = cofiprune.prune(
        model, data, target_sparsity=0.9, teacher=teacher, epochs=1, freeze_epochs=0, finetune_epochs=0,
        one_shot_share=0, batch_size=BATCH, logging_steps=1, progress=False, teacher_memory_mb=0,
    )  # fmt: skip
    return steps_of(result.history)


def test_training_steps_beside_plain_ones() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    dense = BertForSequenceClassification(BertConfig(**GEOMETRY))
    teacher = copy.deepcopy(dense).eval()
    data = rows(BATCH * BATCHES)
    kinds: dict[str, Callable[[], list[float]]] = {
        "plain": lambda: plain_steps(copy.deepcopy(dense), data),
        "finetune": lambda: finetuned(copy.deepcopy(dense), data, dropout=True),
        "finetune, taught": lambda: finetuned(copy.deepcopy(dense), data, teacher=teacher, teacher_memory_mb=0),
        # The second epoch alone: its answers are in memory.
        "finetune, taught, from the second epoch on": lambda: finetuned(
            copy.deepcopy(dense), data, teacher=teacher, epochs=2
        )[BATCHES:],
        "gates on the whole model, taught": lambda: gated(copy.deepcopy(dense), data, teacher),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(ROUNDS):
        for name, run in kinds.items():
            seconds[name] += run()[1:]
    plain = statistics.median(seconds["plain"])
    ratios = {name: statistics.median(found) / plain for name, found in seconds.items()}
    print(f"\nplain step: {1e3 * plain:.0f} ms")
    for name, ratio in ratios.items():
        low, high = (value / plain for value in statistics.quantiles(seconds[name], n=4)[::2])
        print(f"{name}: {ratio:.2f} (quartiles {low:.2f} to {high:.2f})")
    # What was measured (docs/benchmarks.md) and about 0.2 for the noise of a shared machine.
    assert ratios["finetune"] < 1.3
    assert ratios["finetune, taught"] < 1.45
    assert ratios["gates on the whole model, taught"] < 1.5


def test_accounting_and_gates_of_a_large_encoder() -> None:
    config = BertConfig(
        vocab_size=100, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, intermediate_size=8192
    )
    with torch.device("meta"):
        model = BertForSequenceClassification(config)
    structure = cofiprune.structure(model)
    gates = cofiprune.Gates(list(structure.groups))
    cost = cofiprune.accounting.layer_parameters(structure)
    times = []
    for draw in range(20):
        begun = time.perf_counter()
        gates.sample(0, draw)
        loss = cost.expected(gates.expected_sizes()) / cost.exact(structure.sizes)
        loss.backward()
        times.append(time.perf_counter() - begun)
    # 2 * parameters * positions for a forward pass, three times that with the backward pass, at 100 GFLOP/s.
    step = 6 * cost.exact(structure.sizes) * 32 * 128 / 100e9
    print(f"\ngates and accounting of 48 x 2048: {1e3 * statistics.median(times):.1f} ms of a step of {step:.0f} s")
    assert statistics.median(times) < 0.01 * step

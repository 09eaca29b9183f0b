"""What training steps cost beside plain fine-tuning steps of the same model, in turn in one process."""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import pytest

import cofiprune
from bench_models import BATCH, LENGTH, MINILM, PlainLoop, Rows, bert, even_plan, macs, teacher_seconds, token_rows
from bench_models import with_quartiles as quartiles

pytestmark = pytest.mark.bench

BATCHES, ROUNDS = 6, 3
SMALL = 0.033
"""Share of the units of each block with which a twentieth of MiniLM-L6's layers is left."""


def plain_steps(model: Any, data: Rows, *, dropout: bool = True) -> list[float]:
    loop = PlainLoop(model, dropout=dropout)
    return [loop.step(data[start : start + BATCH]) for start in range(0, len(data), BATCH)]


def steps_of(history: list[dict[str, Any]]) -> list[float]:
    """Seconds from one logged step to the next."""
    seconds = [entry["seconds"] for entry in history if "loss" in entry]
    return [after - before for before, after in itertools.pairwise(seconds)]


def finetuned(model: Any, data: Rows, **more: Any) -> list[float]:
    settings = {"batch_size": BATCH, "logging_steps": 1, "progress": False, "train_embeddings": False, "epochs": 1}
    return steps_of(cofiprune.finetune(model, data, **{**settings, **more}).history)


def gated(model: Any, data: Rows, teacher: Any) -> list[float]:
    result = cofiprune.prune(
        model, data, target_sparsity=0.9, teacher=teacher, epochs=1, freeze_epochs=0, finetune_epochs=0,
        one_shot_share=0, batch_size=BATCH, logging_steps=1, progress=False, teacher_memory_mb=0,
    )  # fmt: skip
    return steps_of(result.history)


def test_training_steps_beside_plain_ones(table: Callable[..., Any]) -> None:
    hand_in = table("training-steps")
    dense = bert(MINILM)
    teacher = copy.deepcopy(dense).eval()
    small = cofiprune.compact(dense, even_plan(dense, SMALL, dense.config.hidden_size))
    data = token_rows([LENGTH] * BATCH * BATCHES)
    again = {"teacher": teacher, "epochs": 2}
    kinds: dict[str, Callable[[], list[float]]] = {
        "plain": lambda: plain_steps(copy.deepcopy(dense), data),
        "plain, without dropout": lambda: plain_steps(copy.deepcopy(dense), data, dropout=False),
        "teacher's forward pass alone": lambda: [teacher_seconds(teacher, data[:BATCH]) for _ in range(BATCHES)],
        "`finetune`, no teacher": lambda: finetuned(copy.deepcopy(dense), data, dropout=True),
        "`finetune`, teacher asked in each step": lambda: finetuned(
            copy.deepcopy(dense), data, teacher=teacher, teacher_memory_mb=0
        ),
        # Of these the second epoch alone: its answers are in memory.
        "`finetune`, teacher's answers in memory": lambda: finetuned(copy.deepcopy(dense), data, **again)[BATCHES:],
        "gates on the whole model, teacher asked in each step": lambda: gated(copy.deepcopy(dense), data, teacher),
        "recovery at 95 %, teacher's answers in memory": lambda: finetuned(copy.deepcopy(small), data, **again)[
            BATCHES:
        ],
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(ROUNDS):
        for name, run in kinds.items():
            seconds[name] += run()[1:]
    plain = statistics.median(seconds["plain"])
    ratios = {name: statistics.median(found) / plain for name, found in seconds.items()}
    share, bare = ratios["teacher's forward pass alone"], ratios["plain, without dropout"]
    # Taught models have no dropout.
    floors = {
        "`finetune`, no teacher": 1.0,
        "`finetune`, teacher asked in each step": bare + share,
        "`finetune`, teacher's answers in memory": bare,
        "gates on the whole model, teacher asked in each step": bare + share,
        "recovery at 95 %, teacher's answers in memory": bare * macs(small, LENGTH) / macs(dense, LENGTH),
    }
    rows = [
        [name, *quartiles(found, plain), f"{floors[name]:.2f}" if name in floors else ""]
        for name, found in seconds.items()
    ]
    hand_in([f"by a plain step of {plain:.2f} s", "ratio", "quartiles", "floor"], rows)
    # What was measured (docs/benchmarks.md) and about 0.2 for the noise of a shared machine.
    assert ratios["`finetune`, no teacher"] < 1.3
    assert ratios["`finetune`, teacher asked in each step"] < 1.45
    assert ratios["gates on the whole model, teacher asked in each step"] < 1.5
    assert ratios["recovery at 95 %, teacher's answers in memory"] < 0.4

"""What a whole run costs beside plain fine-tuning for the same number of steps on the same rows.

Plain steps are measured on batches spread evenly over an epoch's, by length, before, between and after the runs, and
the mean over these batches of their median is multiplied by the number of steps. Their batches are those of `prune`:
rows of similar length together, padded to the longest.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import cofiprune
from bench_models import BATCH, MINILM, PlainLoop, Rows, bert, macs, teacher_seconds, token_rows
from cofiprune.data.batches import shuffled

pytestmark = pytest.mark.bench

WHOLE = 8000
ROWS = int(os.environ.get("BENCH_ROWS", WHOLE))
"""Fewer (from 128) while the benchmark is worked on; nothing is published or compared then: one shot costs as much."""
EPOCHS, SAMPLED = 6, 24
BAR = 0.7


def lengths_like_sst2(rows: int) -> np.ndarray[Any, Any]:
    """Lengths of rows, special tokens included: most are short phrases, some whole sentences up to 64."""
    drawn = np.random.default_rng(0).lognormal(2.35, 0.65, rows) + 2
    return np.clip(drawn.round(), 3, 64).astype(np.int64)


class Plain:
    """Plain steps on a sample of batches, with and without dropout."""

    def __init__(self, dense: Any, batches: list[Rows]) -> None:
        self.batches = batches
        self.loops = {drops: PlainLoop(copy.deepcopy(dense), dropout=drops) for drops in (True, False)}
        self.teacher = copy.deepcopy(dense).eval()
        self.rounds: dict[str, list[list[float]]] = {"plain": [], "plain, without dropout": [], "teacher": []}

    def measure(self) -> None:
        kinds: dict[str, Callable[[Rows], float]] = {
            "plain": self.loops[True].step,
            "plain, without dropout": self.loops[False].step,
            "teacher": lambda rows: teacher_seconds(self.teacher, rows),
        }
        for name, run in kinds.items():
            run(self.batches[0])
            self.rounds[name].append([run(rows) for rows in self.batches])

    def mean(self, name: str) -> float:
        """Seconds of a step: of each batch the median over the rounds, of these the mean."""
        return statistics.mean(statistics.median(times) for times in zip(*self.rounds[name], strict=True))


def timed(dense: Any, data: Rows, **settings: Any) -> tuple[float, Any]:
    """Seconds of a run, and its result."""
    model, teacher = copy.deepcopy(dense), copy.deepcopy(dense).eval()
    begun = time.perf_counter()
    result = cofiprune.prune(model, data, target_sparsity=0.95, teacher=teacher, progress=False, **settings)
    return time.perf_counter() - begun, result


def one_shot_seconds(result: Any) -> float:
    return float(next(entry["seconds"] for entry in result.history if entry["phase"] == "one-shot"))


def test_whole_run_beside_plain_fine_tuning(table: Callable[..., Any]) -> None:
    hand_in = table("whole-run", whole=ROWS == WHOLE)
    dense = bert(MINILM)
    lengths = lengths_like_sst2(ROWS)
    data = token_rows(lengths.tolist())
    batches = sorted(shuffled(ROWS, BATCH, lengths, 57, 0), key=lambda batch: int(lengths[batch].max()))
    spread = np.linspace(0, len(batches) - 1, min(SAMPLED, len(batches))).round().astype(int)
    plain = Plain(dense, [[data[row] for row in batches[position]] for position in spread])
    plain.measure()
    runs = {}
    for name, settings in (
        ('`prune`, `method="cofi"` (4 + 2 epochs)', {"method": "cofi", "epochs": 4, "finetune_epochs": 2}),
        ("`prune`, all defaults (one shot, 6 epochs)", {}),
    ):
        runs[name] = timed(dense, data, **settings)
        plain.measure()
    steps = EPOCHS * len(batches)
    whole, strict = (steps * plain.mean(name) for name in ("plain", "plain, without dropout"))
    share = plain.mean("teacher") / plain.mean("plain")
    rows = [
        [f"plain, {steps} steps", f"{whole:.0f}", "", "1", f"{whole / strict:.2f}", ""],
        ["the same without dropout", f"{strict:.0f}", "", f"{strict / whole:.2f}", "1", ""],
    ]
    width = round(float(lengths.mean()))
    for name, (seconds, result) in runs.items():
        # One epoch of the teacher's answers, and steps of what is left in the end, which have no dropout.
        left = macs(cofiprune.compact(result.model), width) / macs(dense, width)
        floor = left * strict / whole + share / EPOCHS
        ratios = [seconds / whole, seconds / strict, floor]
        rows.append([name, f"{seconds:.0f}", f"{one_shot_seconds(result):.0f}", *(f"{one:.2f}" for one in ratios)])
    rows.append(["teacher's forward pass by a plain step", "", "", f"{share:.2f}", "", ""])
    shape = f"{ROWS:,} rows of {lengths.mean():.0f} tokens"
    hand_in([shape, "seconds", "of one shot", "by plain", "by plain without dropout", "floor"], rows)
    if ROWS == WHOLE:
        # A fifth for the noise of a shared machine over minutes.
        assert max(seconds for seconds, _ in runs.values()) < 1.2 * BAR * whole

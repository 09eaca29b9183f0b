"""Prints the ten operations that take most of a plain step, of a step with gates, and of a step of recovery.

    python tests/bench/profile_step.py [--tables docs/benchmarks.md]

Times are of the operations themselves without those they call, on the processor, or on the GPU where there is one.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import cofiprune
from bench_models import BATCH, LENGTH, MINILM, PlainLoop, bert, device, even_plan, token_rows
from bench_tables import Table, about, write

FIRST, STEPS, TOP = 2, 5, 10
"""Steps before the profile begins, steps in it, and operations shown."""
SMALL = 0.033
"""Share of the units of each block with which a twentieth of MiniLM-L6's layers is left."""


def profiler() -> profile:
    on_gpu = [ProfilerActivity.CUDA] if device().type == "cuda" else []
    return profile(activities=[ProfilerActivity.CPU, *on_gpu])


class Watch:
    """A callback that profiles the steps of a run after the first `skip`."""

    def __init__(self, skip: int) -> None:
        self.skip = skip
        self.profile = profiler()

    def __call__(self, entry: dict[str, Any]) -> None:
        if entry["step"] == self.skip:
            self.profile.start()
        elif entry["step"] == self.skip + STEPS:
            self.profile.stop()


def plain_step() -> profile:
    loop, rows = PlainLoop(bert(MINILM)), token_rows([LENGTH] * BATCH)
    for _ in range(FIRST):
        loop.step(rows)
    with profiler() as found:
        for _ in range(STEPS):
            loop.step(rows)
    return found


def gates_step() -> profile:
    model, watch = bert(MINILM), Watch(FIRST)
    cofiprune.prune(
        model, token_rows([LENGTH] * BATCH * (FIRST + STEPS + 1)), target_sparsity=0.9, epochs=1, freeze_epochs=0,
        teacher=copy.deepcopy(model).eval(), finetune_epochs=0, one_shot_share=0, batch_size=BATCH, logging_steps=1,
        progress=False, callbacks=[watch],
    )  # fmt: skip
    return watch.profile


def recovery_step() -> profile:
    model = bert(MINILM)
    small = cofiprune.compact(model, even_plan(model, SMALL, model.config.hidden_size))
    count = STEPS + 1
    watch = Watch(count + 1)  # of the second epoch, in which the teacher's answers are in memory
    cofiprune.finetune(
        small, token_rows([LENGTH] * BATCH * count), teacher=model.eval(), epochs=2, batch_size=BATCH,
        logging_steps=1, progress=False, callbacks=[watch],
    )  # fmt: skip
    return watch.profile


def top(found: profile, name: str) -> Table:
    """The operations that take most, with their shares of all."""
    on = device()
    kind = "self_device_time_total" if on.type == "cuda" else "self_cpu_time_total"
    # The optimiser's step as a whole is an entry too; its own time is what no operation inside has.
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, kind))
    total = sum(getattr(event, kind) for event in events)
    rows = [
        (
            f"`{event.key[:60]}`",
            f"{100 * getattr(event, kind) / total:.1f} %",
            f"{getattr(event, kind) / 1e3 / STEPS:.2f}",
            f"{event.count / STEPS:.0f}",
        )
        for event in events[:TOP]
    ]
    header = (f"of {total / 1e3 / STEPS:.1f} ms a step", "share", "ms", "calls")
    return Table(name, "gpu" if on.type == "cuda" else "cpu", header, tuple(rows), about(on, torch.get_num_threads()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, metavar="PAGE", help="write the tables into this page")
    page = parser.parse_args().tables
    torch.set_num_threads(2)
    kinds: dict[str, Callable[[], profile]] = {
        "profile-plain-step": plain_step,
        "profile-gates-step": gates_step,
        "profile-recovery-step": recovery_step,
    }
    tables = []
    for name, run in kinds.items():
        tables.append(top(run(), name))
        print(f"{name}, {tables[-1]}\n", flush=True)
    if page is not None:
        write(page, tables)


if __name__ == "__main__":
    main()

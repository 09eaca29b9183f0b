"""Measures memory in a process of its own: `python tests/bench/fresh_process.py CASE` prints a line of JSON.

Peaks are the kernel's (VmHWM), which is reset before what is measured; so nothing between two samples is missed.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(name: str = "VmRSS") -> float:
    """MiB of memory that the process has, or with "VmHWM" had at most since `forget_peak`."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    CLEAR.write_text("5")


def measured(*case: str, script: Path = Path(__file__)) -> dict[str, Any]:
    """Run a case in a fresh process.

    :param script: that knows the case.
    :raises subprocess.CalledProcessError: when it fails.
    """
    # Memory is that of the processor's side, so that models stay there.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(script), *case]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compacting(share: str, hidden: str) -> dict[str, Any]:
    """`compact` of BERT-large: its seconds, first and as the median of three, and the peak over the first call."""
    import statistics

    import bench_models as bench
    import cofiprune

    model = bench.bert(bench.BERT_LARGE).eval()
    plan = bench.even_plan(model, float(share), int(hidden))
    forget_peak()
    before = resident()
    seconds = []
    result: dict[str, Any] = {}
    for _ in range(3):
        begun = time.perf_counter()
        small = cofiprune.compact(model, plan)
        seconds.append(time.perf_counter() - begun)
        if not result:
            structure = cofiprune.structure(model)
            cost = cofiprune.accounting.layer_parameters(structure)
            result = {
                "dense": before,
                "peak": resident("VmHWM"),
                "small": sum(p.numel() * p.element_size() for p in small.parameters()) / 2**20,
                "sparsity": 1 - cost.exact(plan.kept) / cost.exact(structure.sizes),
            }
        del small
    return {**result, "first": seconds[0], "seconds": statistics.median(seconds)}


def plain_steps(*options: str) -> dict[str, Any]:
    """Plain fine-tuning steps: the peak over all but the first, over the memory of the imports."""
    import bench_models as bench

    before = resident()
    loop = bench.PlainLoop(bench.bert(bench.MINILM), dropout="without dropout" not in options)
    rows = bench.token_rows([bench.LENGTH] * bench.BATCH)
    loop.step(rows)
    forget_peak()
    for _ in range(4):
        loop.step(rows)
    return {"peak": resident("VmHWM") - before}


def gate_steps() -> dict[str, Any]:
    """Steps of gates and weights with a teacher on the whole model; `call`: the peak of all of `prune`."""
    import bench_models as bench
    import cofiprune

    before = resident()
    model = bench.bert(bench.MINILM)
    teacher = copy.deepcopy(model).eval()
    weights = sum(p.numel() * p.element_size() for p in teacher.parameters()) / 2**20
    rows = bench.token_rows([bench.LENGTH] * bench.BATCH * 5)
    peaks = {"call": 0.0}

    def note(entry: dict[str, Any]) -> None:
        peaks["call"] = max(peaks["call"], resident("VmHWM") - before)
        if entry["step"] == 1:
            forget_peak()
        elif entry["step"] == 5 and "peak" not in peaks:
            peaks["peak"] = resident("VmHWM") - before

    cofiprune.prune(
        model, rows, target_sparsity=0.9, teacher=teacher, epochs=1, freeze_epochs=0, finetune_epochs=0,
        one_shot_share=0, batch_size=bench.BATCH, logging_steps=1, progress=False, callbacks=[note],
    )  # fmt: skip
    peaks["call"] = max(peaks["call"], resident("VmHWM") - before)
    return {**peaks, "teacher": weights}


if __name__ == "__main__":
    import torch

    import cofiprune  # noqa: F401  # what is imported is no part of what is measured

    torch.set_num_threads(2)
    print(json.dumps({"compact": compacting, "plain": plain_steps, "gates": gate_steps}[sys.argv[1]](*sys.argv[2:])))

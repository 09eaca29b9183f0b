"""How fast the exported forms of the compacted BERT-base are, over the dense one in torch and in the same engine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import cofiprune
from bench_models import bert, structure_at_95_percent, token_rows
from cofiprune.data.synthetic import synthetic_inputs
from cofiprune.export.openvino import openvino_answers
from cofiprune.export.sessions import onnx_answers
from cofiprune.timing import cpu_threads, in_turn

pytestmark = pytest.mark.bench

CPU = torch.device("cpu")
RUNS = {1: 30, 32: 5}
LEAST = {"ONNX Runtime, float32": 19, "OpenVINO, bfloat16": 40}
"""Speed-ups over the dense model in torch that are to be had on a processor with AVX-512 and bfloat16."""


def engines(model: Any, folder: Path) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Export a model, and load each file for one thread."""
    formats = ("onnx", "openvino") if find_spec("openvino") else ("onnx",)
    rows = token_rows([128] * 8)
    for entry in cofiprune.export(model, folder, format=formats, dataset=rows, int8="static").values():
        if entry.kind.startswith("onnx"):
            kind = "int8" if entry.kind.endswith("int8") else "float32"
            yield f"ONNX Runtime, {kind}", onnx_answers(entry.path, threads=1)
        else:
            kinds = {"f32": "int8"} if entry.kind.endswith("int8") else {"f32": "float32", "bf16": "bfloat16"}
            for precision, kind in kinds.items():
                yield f"OpenVINO, {kind}", openvino_answers(entry.path, threads=1, precision=precision)


def test_engines(table: Callable[..., Any], tmp_path: Path) -> None:
    hand_in = table("bert-base-95-engines", on=CPU)
    dense = bert({}).eval()
    small = cofiprune.compact(dense, structure_at_95_percent(dense))
    loaded: dict[tuple[str, bool], Callable[..., Any]] = {
        (name, one is small): answer
        for one in (dense, small)
        for name, answer in engines(one, tmp_path / ("small" if one is small else "dense"))
    }
    passes = {("torch, float32", False): lambda batch: dense(**batch), ("torch, float32", True): lambda b: small(**b)}
    passes.update(loaded)
    found: dict[str, list[str]] = {}
    speeds: dict[str, float] = {}
    with cpu_threads(1), torch.inference_mode():
        for size, runs in RUNS.items():
            batch = synthetic_inputs(dense, batch_size=size, seq_len=128)
            seconds = in_turn([partial(each, batch) for each in passes.values()], CPU, runs=runs, warmup=1)
            medians = dict(zip(passes, map(statistics.median, seconds), strict=True))
            base = medians["torch, float32", False]
            for name in dict.fromkeys(name for name, _ in passes):
                ours, theirs = medians[name, True], medians[name, False]
                found.setdefault(name, [name]).extend((f"{base / ours:.1f}", f"{theirs / ours:.1f}"))
                speeds[name] = max(speeds.get(name, 0), base / ours)
        header = ["batch", *(f"{size}: over dense {what}" for size in RUNS for what in ("torch", "in the same engine"))]
        hand_in(header, list(found.values()))
    for name, least in LEAST.items():
        assert speeds.get(name, least) > least * 0.8, name

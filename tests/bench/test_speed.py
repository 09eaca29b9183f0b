"""Ratios that the documentation states, measured in turn in one process; `make bench` prints them."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import cofiprune
from cofiprune.plan import Plan
from cofiprune.products import onednn_is_faster

pytestmark = pytest.mark.bench

HEADS = (2, 0, 3, 0, 0, 2, 3, 0, 2, 0, 3, 0)
FFN = (150, 142, 118, 0, 131, 96, 149, 88, 0, 145, 133, 104)
HIDDEN = 600


def structure_at_95_percent(model: BertForSequenceClassification) -> Plan:
    """A structure that the original's training arrives at for BERT-base and a target of 0.95."""
    structure = cofiprune.structure(model)
    values = {"hidden": (torch.arange(768) < HIDDEN).float()}
    for layer, (heads, ffn) in enumerate(zip(HEADS, FFN, strict=True)):
        values[f"layers.{layer}.heads"] = (torch.arange(12) < heads).float()
        values[f"layers.{layer}.intermediate"] = (torch.arange(3072) < ffn).float()
    return Plan.from_values(structure, values)


def test_compacted_bert_base_against_dense() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    dense = BertForSequenceClassification(BertConfig()).eval()
    plan = structure_at_95_percent(dense)
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        small = cofiprune.compact(dense, plan)
        times.append(time.perf_counter() - begun)
    report = cofiprune.benchmark(small, dense, batch_size=(1, 32), seq_len=(128,))
    print(f"\ncompact: {statistics.median(times):.2f} s (median of 3)\n{report}")
    speedups = [row.speedup for row in report.rows]
    assert min(speedups) > 5


@pytest.mark.parametrize("threads", [1, 2])
def test_fused_against_separate(threads: int) -> None:
    torch.manual_seed(0)
    dense = BertForSequenceClassification(BertConfig()).eval()
    small = cofiprune.compact(dense, structure_at_95_percent(dense))
    fused = cofiprune.compact(small, fuse=True)
    report = cofiprune.benchmark(fused, small, batch_size=(1, 32), seq_len=(128,), threads=threads, seconds=10)
    print(f"\noneDNN is faster than F.linear here: {onednn_is_faster()}\n{report}")
    speedups = [row.speedup for row in report.rows]
    assert min(speedups) > (1.2 if onednn_is_faster() else 0.9)


def test_import_costs_little_more_than_transformers() -> None:
    stock = "import torch, transformers.modeling_utils"
    ratios = []
    for _ in range(7):
        seconds = []
        for code in (stock, f"{stock}, cofiprune"):
            begun = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            seconds.append(time.perf_counter() - begun)
        ratios.append(seconds[1] / seconds[0])
    print(f"\nimport cofiprune: {statistics.median(ratios):.3f} of importing torch and transformers' modelling code")
    assert statistics.median(ratios) < 1.1

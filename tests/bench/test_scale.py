"""`compact` of a large encoder, its time and its memory; and what gates and accounting cost there."""

from __future__ import annotations

import mmap
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import cofiprune
from fresh_process import STATUS, measured

pytestmark = pytest.mark.bench

CPU = torch.device("cpu")
CUTS = {"95 %": ("0.0625", "800"), "50 %": ("0.52", "992")}
"""Share of the heads and feed-forward dimensions of each layer, and hidden dimensions, that stay."""


def touched(mebibytes: int) -> float:
    """Seconds that the system takes to hand out so much memory for the first time.

    Memory that a virtual machine has not used yet comes slowly; it is asked for here, so that no measurement pays.
    """
    begun = time.perf_counter()
    with mmap.mmap(-1, mebibytes * 2**20) as memory:
        for page in range(0, len(memory), mmap.PAGESIZE):
            memory[page] = 1
    return time.perf_counter() - begun


@pytest.mark.skipif(not STATUS.exists(), reason="memory is measured where the kernel tells it in /proc")
def test_compact_of_bert_large(table: Callable[..., Any]) -> None:
    hand_in = table("compact-bert-large", on=CPU)
    touched(3072)
    found = {name: measured("compact", *cut) for name, cut in CUTS.items()}
    hand_in(
        ["cut to", "sparsity", "first call, s", "median of 3, s", "dense, MiB", "peak, MiB", "ratio", "floor"],
        [
            [
                name,
                f"{row['sparsity']:.3f}",
                f"{row['first']:.2f}",
                f"{row['seconds']:.2f}",
                f"{row['dense']:.0f}",
                f"{row['peak']:.0f}",
                f"{row['peak'] / row['dense']:.2f}",
                f"{1 + row['small'] / row['dense']:.2f}",
            ]
            for name, row in found.items()
        ],
    )
    for row in found.values():
        assert row["seconds"] < 1
        assert row["first"] < 1.5  # 1 s, and half of it for the noise of a single call
        # Nothing beside the model that is returned, but for a few of its matrices.
        assert row["peak"] < 1.02 * (row["dense"] + row["small"])
    # At 50 % the model that is returned is more than that by itself.
    assert found["95 %"]["peak"] < 1.3 * found["95 %"]["dense"]


def test_accounting_and_gates_of_a_large_encoder(table: Callable[..., Any]) -> None:
    hand_in = table("gates-of-a-large-encoder", on=CPU)
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
    hand_in(
        ["48 layers, 2048 wide", "milliseconds"],
        [["sampling gates, expected sparsity, backward", f"{1e3 * statistics.median(times):.1f}"]],
    )
    assert statistics.median(times) < 0.01 * step

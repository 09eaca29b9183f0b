"""Models, rows, plans and plain training loops that the benchmarks share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

import cofiprune
from cofiprune import accounting
from cofiprune.plan import Plan

BATCH, LENGTH = 32, 64
MINILM: Mapping[str, int] = {
    "vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
    "intermediate_size": 1536,
}  # fmt: skip
"""The geometry of MiniLM-L6."""
BERT_LARGE: Mapping[str, int] = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
}  # fmt: skip
HEADS = (2, 0, 3, 0, 0, 2, 3, 0, 2, 0, 3, 0)
FFN = (150, 142, 118, 0, 131, 96, 149, 88, 0, 145, 133, 104)
HIDDEN = 600

Rows = list[dict[str, Any]]


def device() -> torch.device:
    """Where `prune` trains, and so where its steps are compared."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait(on: torch.device | None = None) -> None:
    """Let a GPU finish what it was asked for."""
    if (on or device()).type == "cuda":
        torch.cuda.synchronize()


def bert(geometry: Mapping[str, int]) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**geometry))


def structure_at_95_percent(model: PreTrainedModel) -> Plan:
    """A structure that the original's training arrives at for BERT-base and a target of 0.95."""
    values = {"hidden": (torch.arange(768) < HIDDEN).float()}
    for layer, (heads, ffn) in enumerate(zip(HEADS, FFN, strict=True)):
        values[f"layers.{layer}.heads"] = (torch.arange(12) < heads).float()
        values[f"layers.{layer}.intermediate"] = (torch.arange(3072) < ffn).float()
    return Plan.from_values(cofiprune.structure(model), values)


def even_plan(model: PreTrainedModel, share: float, hidden: int) -> Plan:
    """Keep a share of the inner units of every block, and so many hidden dimensions, scattered at random."""
    generator = torch.Generator().manual_seed(0)
    values: dict[str, Tensor] = {}
    structure = cofiprune.structure(model)
    for group in structure.groups:
        if group.size > 1:
            kept = hidden if group.name == "hidden" else max(1, round(share * group.size))
            values[group.name] = torch.zeros(group.size)
            values[group.name][torch.randperm(group.size, generator=generator)[:kept]] = 1
    return Plan.from_values(structure, values)


def token_rows(lengths: Iterable[int]) -> Rows:
    """Rows of random tokens, labelled 0 and 1 in turn."""
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(1000, 30000, (length,), generator=generator).tolist(), "labels": index % 2}
        for index, length in enumerate(lengths)
    ]


def batch_of(rows: Rows) -> dict[str, Tensor]:
    """Pad rows to the longest of them."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    labels = torch.tensor([row["labels"] for row in rows])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}
    return {name: value.to(device()) for name, value in batch.items()}


class PlainLoop:
    """A plain training loop: forward, backward, clipping, AdamW; embedding tables frozen, as `prune` has them."""

    def __init__(self, model: PreTrainedModel, *, dropout: bool = True) -> None:
        self.model = model.to(device()).train(dropout)  # type: ignore[arg-type]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("embeddings" not in name or "LayerNorm" in name)
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step(self, rows: Rows) -> float:
        """Seconds of a step, its batch's padding included."""
        wait()
        begun = time.perf_counter()
        self.model(**batch_of(rows)).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        wait()
        return time.perf_counter() - begun


@torch.no_grad()
def teacher_seconds(model: PreTrainedModel, rows: Rows) -> float:
    """Seconds of a forward pass without gradients."""
    batch = batch_of(rows)
    del batch["labels"]
    model.to(device()).eval()  # type: ignore[arg-type]
    wait()
    begun = time.perf_counter()
    model(**batch)
    wait()
    return time.perf_counter() - begun


def macs(model: PreTrainedModel, length: int) -> int:
    """Multiply-accumulates of a forward pass over one row."""
    structure = cofiprune.structure(model)
    return accounting.model_macs(structure, length).exact(structure.sizes)


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that a forward pass reads; of the embedding tables it looks up a few rows."""
    tables = set(cofiprune.structure(model).embeddings)
    read = (value for name, value in model.named_parameters() if name not in tables)
    return sum(value.numel() * value.element_size() for value in read)


def copy_bandwidth(on: torch.device, megabytes: int = 512) -> float:
    """Bytes per second that a copy of a large tensor reads and writes; the median of nine."""
    source = torch.ones(megabytes * 2**18, device=on)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        wait(on)
        begun = time.perf_counter()
        target.copy_(source)
        wait(on)
        seconds.append(time.perf_counter() - begun)
    return 2 * source.numel() * source.element_size() / statistics.median(seconds[1:])


def with_quartiles(seconds: Sequence[float], unit: float) -> list[str]:
    """The median and the quartiles of times, in a unit."""
    low, high = (value / unit for value in statistics.quantiles(seconds, n=4)[::2])
    return [f"{statistics.median(seconds) / unit:.2f}", f"{low:.2f} to {high:.2f}"]


def in_a_graph(compute: Callable[[], Any]) -> Callable[[], None]:
    """Record what a GPU is told by a computation, after it has warmed up; return what tells it all that at once."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside), torch.no_grad():
        for _ in range(3):
            compute()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        compute()
    return graph.replay

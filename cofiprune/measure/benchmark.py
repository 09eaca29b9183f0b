"""How fast a model runs on this device, side by side with a baseline.

The two are measured in turn within one process, so that a change in the machine's clock or load meets
both; medians keep single outliers out. The ratio of multiply-accumulates says what speed-up would be
ideal: what is missing from it is overhead that does not shrink with the model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cofiprune import accounting
from cofiprune.accounting import amount
from cofiprune.adapter import structure
from cofiprune.data.synthetic import synthetic_inputs
from cofiprune.errors import AdapterError, SettingsError
from cofiprune.hooks import reading, watching
from cofiprune.masking import masks_of
from cofiprune.measure.report import Report, rich_table
from cofiprune.timing import Timing, cpu_threads, in_turn, timing

if TYPE_CHECKING:
    from rich.console import Group
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class BenchmarkRow:
    """One size of batch."""

    batch_size: int
    seq_len: int
    """Length that the encoder's layers see: the one asked for, for images the number of patches."""
    model: Timing
    baseline: Timing | None
    ideal_speedup: float | None
    """Ratio of multiply-accumulates; None without a baseline, or where a family has no adapter to count them."""

    @property
    def speedup(self) -> float | None:
        """Baseline's median over the model's; None without a baseline."""
        return None if self.baseline is None else self.baseline.median_ms / self.model.median_ms


@dataclass(frozen=True, repr=False)
class BenchmarkReport(Report):
    """Latency and throughput by batch size and length; prints as a table, and renders in notebooks."""

    model: str
    baseline: str | None
    device: str
    dtype: str
    threads: int
    """Threads of the CPU that torch computes with."""
    rows: tuple[BenchmarkRow, ...]
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        entries = asdict(self)
        entries["rows"] = [{**asdict(row), "speedup": row.speedup} for row in self.rows]
        return entries

    def _title(self) -> str:
        return f"{self.model}, against {self.baseline}" if self.baseline else self.model

    def _setting(self) -> str:
        threads = f", {self.threads} {'thread' if self.threads == 1 else 'threads'}" if self.device == "cpu" else ""
        return f"milliseconds per batch on {self.device}{threads}, {self.dtype}"

    def _table(self) -> tuple[list[str], list[list[str]]]:
        header = ["batch", "length", "median", "p90", "examples/s"]
        if self.baseline is not None:
            header += ["baseline median", "p90", "examples/s", "speed-up", "ideal"]
        rows = []
        for row in self.rows:
            cells = [str(row.batch_size), str(row.seq_len), *_cells(row.model)]
            if row.baseline is not None:
                cells += [*_cells(row.baseline), f"{row.speedup:.2f}x"]
                cells.append("" if row.ideal_speedup is None else f"{row.ideal_speedup:.2f}x")
            rows.append(cells)
        return header, rows

    def __rich__(self) -> Group:
        from rich.console import Group

        return Group(self._title(), self._setting(), rich_table(*self._table()), *([self.note] if self.note else []))


def benchmark(
    model: PreTrainedModel,
    baseline: PreTrainedModel | None = None,
    *,
    batch_size: int | Sequence[int] = (1, 32),
    seq_len: int | Sequence[int] = (128,),
    runs: int | None = None,
    warmup: int = 3,
    seconds: float = 5.0,
    threads: int | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> BenchmarkReport:
    """Time a model's forward pass on made-up inputs, on the device it is on.

    :param baseline: measured in turn with the model, for the speed-up; on the same device.
    :param seq_len: tokens per example, or frames of audio; images have the size of the configuration.
    :param runs: timed passes for each model and size; by default at least 5, and more within `seconds`.
    :param warmup: passes before the timed ones.
    :param seconds: time to spend on each size, both models together.
    :param threads: of the CPU; torch's present number by default.
    :param dtype: measure copies in this precision instead of the models themselves.
    :raises SettingsError: for sizes below 1, or models on different devices.
    :raises DataError: when a model cannot read so many tokens.
    """
    sizes, lengths = _whole("batch_size", batch_size), _whole("seq_len", seq_len)
    _whole("runs", 1 if runs is None else runs)
    _whole("threads", 1 if threads is None else threads)
    pair = [model] if baseline is None else [model, baseline]
    if baseline is not None and baseline.device != model.device:
        raise SettingsError(f"the baseline is on {baseline.device} and the model on {model.device}; put both on one")
    note = ""
    if masks_of(model) is not None:
        note = "The model was timed under its masks; cofiprune.compact(model) is what becomes smaller and faster."
    if dtype is not None:
        pair = [one if one.dtype == dtype else copy.deepcopy(one).to(dtype) for one in pair]  # type: ignore[arg-type]
    if model.main_input_name == "pixel_values":
        lengths = lengths[:1]
    for one in pair:  # a length that is too much for a model is known before anything is timed
        synthetic_inputs(one, batch_size=1, seq_len=max(lengths), generator=torch.Generator())
    rows = []
    with cpu_threads(threads), reading(*pair), torch.inference_mode():
        for length in lengths:
            for size in sizes:
                rows.append(_row(pair, size, length, runs, warmup, seconds, seed))
        used = torch.get_num_threads()
    return BenchmarkReport(
        model=_described(model),
        baseline=None if baseline is None else _described(baseline),
        device=_device_name(model.device),
        dtype=str(pair[0].dtype).removeprefix("torch."),
        threads=used,
        rows=tuple(rows),
        note=note,
    )


def _row(
    pair: Sequence[PreTrainedModel], size: int, length: int, runs: int | None, warmup: int, seconds: float, seed: int
) -> BenchmarkRow:
    """Time each model on one size of batch, in turn."""
    inputs = [
        synthetic_inputs(one, batch_size=size, seq_len=length, generator=torch.Generator().manual_seed(seed))
        for one in pair
    ]
    seen = [seen_length(one, batch, length) for one, batch in zip(pair, inputs, strict=True)]
    passes = [partial(one, **batch) for one, batch in zip(pair, inputs, strict=True)]
    times = in_turn(passes, pair[0].device, runs=runs, warmup=warmup, seconds=seconds)
    timings = [timing(one, size) for one in times]
    macs = [_macs(one, tokens) for one, tokens in zip(pair, seen, strict=True)]
    ideal = macs[1] / macs[0] if len(pair) == 2 and macs[0] and macs[1] else None
    return BenchmarkRow(size, seen[0], timings[0], timings[1] if len(pair) == 2 else None, ideal)


def seen_length(model: PreTrainedModel, inputs: Mapping[str, Tensor], asked: int) -> int:
    """Length of the sequence that the encoder's first layer reads."""
    try:
        path = structure(model).layers[0]
    except (AdapterError, IndexError):
        return asked
    seen: list[int] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() == 3)
        seen.extend(value.shape[1] for value in tensors)

    with reading(model), torch.no_grad(), watching(model, before={path: note}):
        model(**inputs)
    return seen[0] if seen else asked


def _macs(model: PreTrainedModel, seq_len: int) -> int | None:
    try:
        table = structure(model)
    except AdapterError:
        return None
    return accounting.model_macs(table, seq_len).exact(table.sizes)


def _cells(one: Timing) -> list[str]:
    return [f"{one.median_ms:.2f}", f"{one.p90_ms:.2f}", f"{one.examples_per_second:.1f}"]


def _whole(name: str, value: int | Sequence[int]) -> list[int]:
    values = list(value) if isinstance(value, Sequence) else [value]
    if not values or any(isinstance(one, bool) or not isinstance(one, int) or one < 1 for one in values):
        raise SettingsError(f"{name} takes whole numbers of at least 1, not {value!r}")
    return values


def _described(model: PreTrainedModel) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{type(model).__name__} ({amount(count)} parameters)"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

"""Latency and throughput of a model on this device, side by side with a baseline.

Both are timed in turn within one process, so that a change in the machine's clock or load affects both; medians keep
outliers out. The ratio of multiply-accumulates is the ideal speed-up: overhead does not shrink with the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from cofiprune import accounting
from cofiprune.accounting import amount
from cofiprune.adapter import structure as structure_of
from cofiprune.data.synthetic import synthetic_inputs
from cofiprune.data.tasks import main_input
from cofiprune.errors import AdapterError, SettingsError, names_checked
from cofiprune.hooks import reading, watching
from cofiprune.masking import masks_of
from cofiprune.measure.report import Report, rich_table
from cofiprune.structure import Structure
from cofiprune.timing import cpu_threads, in_turn
from cofiprune.whole import inside

if TYPE_CHECKING:
    from rich.console import Group
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Timing:
    """Latencies of one model on one batch size."""

    median_ms: float
    """Milliseconds per batch."""
    p90_ms: float
    """90th percentile of milliseconds per batch."""
    examples_per_second: float
    """Batch size over the median."""
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float], batch_size: int) -> Timing:
        """Sum up the seconds of runs on batches of one size."""
        median = float(np.median(seconds))
        return cls(1e3 * median, 1e3 * float(np.percentile(seconds, 90)), batch_size / median, len(seconds))


@dataclass(frozen=True)
class BenchmarkRow:
    """The timings of one batch size and length."""

    batch_size: int
    seq_len: int
    """Length that the encoder's layers see: the one asked for, or for images the number of patches."""
    model: Timing
    baseline: Timing | None
    ideal_speedup: float | None
    """Ratio of multiply-accumulates; None without a baseline, or for a family without an adapter."""
    speedup: float | None
    """Baseline's median over the model's; None without a baseline."""


@dataclass(frozen=True, repr=False)
class BenchmarkReport(Report):
    """Latency and throughput by batch size and length; prints as a table, and renders in notebooks."""

    model: str
    baseline: str | None
    device: str
    dtype: str
    threads: int
    """CPU threads of torch."""
    rows: tuple[BenchmarkRow, ...]
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return asdict(self)

    def __rich__(self) -> Group:
        from rich.console import Group

        title = f"{self.model},\nagainst {self.baseline}" if self.baseline else self.model
        threads = f", {self.threads} {'thread' if self.threads == 1 else 'threads'}" if self.device == "cpu" else ""
        setting = f"milliseconds per batch on {self.device}{threads}, {self.dtype}"
        header = ["batch", "length", "", "median", "p90", "examples/s", "speed-up", "ideal"]
        rows = [cells for row in self.rows for cells in _cells(row)]
        if self.baseline is None:
            header, rows = header[:2] + header[3:6], [cells[:2] + cells[3:6] for cells in rows]
        return Group(title, setting, rich_table(header, rows), *([self.note] if self.note else []))


def _cells(row: BenchmarkRow) -> list[list[str]]:
    """The lines of a size: the model's, and below it the baseline's where there is one."""
    ratios = ["" if ratio is None else f"{ratio:.2f}x" for ratio in (row.speedup, row.ideal_speedup)]
    lines = [[str(row.batch_size), str(row.seq_len), "model", *_timing(row.model), *ratios]]
    return lines if row.baseline is None else [*lines, ["", "", "baseline", *_timing(row.baseline), "", ""]]


def _timing(timing: Timing) -> list[str]:
    return [f"{timing.median_ms:.2f}", f"{timing.p90_ms:.2f}", f"{timing.examples_per_second:.1f}"]


@names_checked
def benchmark(
    model: PreTrainedModel,
    baseline: PreTrainedModel | None = None,
    *,
    batch_size: int | Sequence[int] = (1, 32),
    seq_len: int | Sequence[int] = (128,),
    runs: int | None = None,
    seconds: float = 5.0,
    threads: int | None = None,
    dtype: torch.dtype | None = None,
) -> BenchmarkReport:
    """Time a model's forward pass on synthetic inputs, on the device that it is on.

    :param baseline: timed in turn with the model, for the speed-up; on the same device.
    :param seq_len: tokens per example, or frames of audio; images have the size of the configuration.
    :param runs: timed passes for each model and size; by default at least 5, and more within `seconds`.
    :param seconds: time for each size, both models together.
    :param threads: of the CPU; torch's present number by default.
    :param dtype: time copies in this precision instead of the models themselves.
    :raises SettingsError: for sizes below 1, or models on different devices.
    :raises DataError: when a model cannot read so many tokens.
    """
    model, baseline = inside(model), inside(baseline)
    sizes, lengths = _counts("batch_size", batch_size), _counts("seq_len", seq_len)
    _counts("runs", 1 if runs is None else runs)
    _counts("threads", 1 if threads is None else threads)
    pair = [model] if baseline is None else [model, baseline]
    if baseline is not None and baseline.device != model.device:
        raise SettingsError(f"the baseline is on {baseline.device} and the model on {model.device}; put both on one")
    note = ""
    if masks_of(model) is not None:
        note = "The model was timed under its masks; cofiprune.compact(model) is what becomes smaller and faster."
    if dtype is not None:
        pair = [one if one.dtype == dtype else copy.deepcopy(one).to(dtype) for one in pair]  # type: ignore[arg-type]
    if main_input(model).startswith("pixel_values"):
        lengths = lengths[:1]
    for one in pair:  # a length that is too much for a model is known before anything is timed
        synthetic_inputs(one, batch_size=1, seq_len=max(lengths))
    described = [(one, _structure_or_none(one)) for one in pair]
    timer = partial(in_turn, device=model.device, runs=runs, seconds=seconds)
    with cpu_threads(threads), reading(*pair), torch.inference_mode():
        rows = [_row(described, size, length, timer) for length in lengths for size in sizes]
        used = torch.get_num_threads()
    names = [f"{type(one).__name__} ({amount(one.num_parameters())} parameters)" for one in pair]
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type
    kind = str(pair[0].dtype).removeprefix("torch.")
    return BenchmarkReport(names[0], names[1] if baseline is not None else None, device, kind, used, tuple(rows), note)


def _row(
    described: Sequence[tuple[PreTrainedModel, Structure | None]],
    size: int,
    length: int,
    timer: Callable[[Sequence[Callable[[], object]]], list[list[float]]],
) -> BenchmarkRow:
    """Time one or two models on one size of batch."""
    passes, seen, macs = [], [], []
    for model, structure in described:
        inputs = synthetic_inputs(model, batch_size=size, seq_len=length)
        passes.append(partial(model, **inputs))
        seen.append(length)
        if structure is not None:
            seen[-1] = seen_length(model, structure, inputs, length)
            macs.append(accounting.model_macs(structure, seen[-1]).exact(structure.sizes))
    ours, *baselines = (Timing.of(times, size) for times in timer(passes))
    baseline = baselines[0] if baselines else None
    ideal = macs[1] / macs[0] if len(macs) == 2 and all(macs) else None
    speedup = None if baseline is None else baseline.median_ms / ours.median_ms
    return BenchmarkRow(size, seen[0], ours, baseline, ideal, speedup)


def seen_length(model: PreTrainedModel, structure: Structure, inputs: Mapping[str, Tensor], asked: int) -> int:
    """Return the length of the sequence that the encoder's first layer reads; `asked` for one without layers."""
    seen: list[int] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() == 3)
        seen.extend(value.shape[1] for value in tensors)

    with reading(model), torch.no_grad(), watching(model, before=dict.fromkeys(structure.layers[:1], note)):
        model(**inputs)
    return seen[0] if seen else asked


def _structure_or_none(model: PreTrainedModel) -> Structure | None:
    try:
        return structure_of(model)
    except AdapterError:
        return None


def _counts(name: str, value: int | Sequence[int]) -> list[int]:
    values = list(value) if isinstance(value, Sequence) else [value]
    if not values or any(isinstance(one, bool) or not isinstance(one, int) or one < 1 for one in values):
        raise SettingsError(f"{name} takes whole numbers of at least 1, not {value!r}")
    return values

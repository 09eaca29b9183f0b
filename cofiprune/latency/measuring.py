"""Measuring a latency table: real, compacted models with some blocks of one size and no others, against one with none.

So a block runs inside the model's own forward pass, on the masks, positions and caches that it will meet there.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from cofiprune.compaction import compact
from cofiprune.data.synthetic import synthetic_inputs
from cofiprune.hooks import evaluating
from cofiprune.latency.table import Conditions, LatencyTable, Surface
from cofiprune.plan import Plan
from cofiprune.record import sizes_to_record
from cofiprune.structure import Block, Structure
from cofiprune.timing import in_turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WIDTH_SHARES = (0.125, 0.25, 0.5, 1.0)
_UNIT_SHARES = (1 / 32, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
_FEW = 8
"""Up to so many units every number of them is measured."""
_FINE = 64
"""From so many units on, multiples of 8 are measured."""
_SECONDS = 1.0
"""For one width and one kind of block, beside the five runs that each size gets in any case."""
_LONG = 0.25
"""Seconds of a forward pass from which on a block is measured alone and not many like it together."""

Progress = Callable[[float], None]


def conditions_of(
    model: PreTrainedModel, structure: Structure, *, batch_size: int, seq_len: int, cut_hidden: bool
) -> Conditions:
    """What a table for this model, on the device where it is, holds for.

    :param cut_hidden: other widths than the model's are measured too.
    """
    on_cpu = model.device.type == "cpu"
    on_cuda = model.device.type == "cuda"
    other = torch.cuda.get_device_name(model.device) if on_cuda else model.device.type
    return Conditions(
        device=cpu_name() if on_cpu else other,
        threads=torch.get_num_threads() if on_cpu else 0,
        torch=torch.__version__,
        dtype=str(model.dtype).removeprefix("torch."),
        batch_size=batch_size,
        seq_len=seq_len,
        model=type(model).__name__,
        sizes={**sizes_to_record(structure.sizes), "fixed": sum(spec.fixed for spec in structure.parameters)},
        widths=_widths(structure, cut_hidden),
    )


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return found or platform.processor() or platform.machine()


def measure(
    model: PreTrainedModel, structure: Structure, conditions: Conditions, on_progress: Progress | None = None
) -> LatencyTable:
    """Measure a table; takes from seconds to a few minutes.

    :param model: without fractional masks; it is not changed.
    """
    alike = _alike(structure)
    with timed(model, conditions) as stopwatch:
        dense = float(np.median(stopwatch([compact(model, Plan.from_values(structure, {}))])))
        together = 1 if dense > _LONG * 1e9 else len(structure.blocks)
        fixed: list[float] = []
        grids: dict[str, list[list[float]]] = {name: [] for name in alike}
        for row, width in enumerate(conditions.widths):
            empty = _with(model, structure, width, (), None)
            rows = []
            for index, (name, blocks) in enumerate(alike.items()):
                several = blocks[:together]
                models = [
                    _with(model, structure, width, several, units) for units in _unit_levels(structure, blocks[0])
                ]
                several_times = stopwatch([_same_tables(empty, each, structure) for each in [empty, *models]])
                times = [float(time) for time in np.median(several_times, axis=1)]
                grids[name].append([max(time - times[0], 0.0) / len(several) for time in times[1:]])
                rows.append(times[0])
                if on_progress is not None:
                    on_progress((row + (index + 1) / len(alike)) / len(conditions.widths))
            fixed.append(float(np.median(rows)))
    surfaces = {
        name: Surface(tuple(_unit_levels(structure, blocks[0])), _rising(grids[name])) for name, blocks in alike.items()
    }
    stands_for = {block.gate: name for name, blocks in alike.items() for block in blocks}
    return LatencyTable(conditions, dense, tuple(np.maximum.accumulate(fixed).tolist()), surfaces, stands_for)


Stopwatch = Callable[[Sequence["PreTrainedModel"]], NDArray[np.float64]]
"""From some models to the nanoseconds of their forward passes, [models, rounds], measured in turn."""


@contextmanager
def timed(model: PreTrainedModel, conditions: Conditions, *, seconds: float = _SECONDS) -> Iterator[Stopwatch]:
    """What measures models under some conditions.

    :param seconds: for all of them together, beside the five rounds that there are in any case.
    """

    def stopwatch(models: Sequence[PreTrainedModel]) -> NDArray[np.float64]:
        with ExitStack() as stack:
            passes = []
            for each in models:
                each.to(model.device)  # type: ignore[arg-type]
                stack.enter_context(evaluating(each))
                passes.append(partial(each, **inputs))
            own = model.device.type == "cpu" and torch.get_num_threads() == 1
            rounds = in_turn(passes, model.device, seconds=seconds, warmup=2, own_time=own)
        return 1e9 * np.asarray(rounds)

    with torch.inference_mode():
        generator = torch.Generator().manual_seed(0)
        inputs: dict[str, Any] = dict(
            synthetic_inputs(model, batch_size=conditions.batch_size, seq_len=conditions.seq_len, generator=generator)
        )
        yield stopwatch


def _alike(structure: Structure) -> dict[str, list[Block]]:
    """Blocks of one shape, by the gate of the first among them."""
    found: dict[Any, list[Block]] = {}
    for block in structure.blocks:
        if block.gate not in structure:
            continue
        shapes = tuple(spec.shape for spec in structure.parameters if spec.gate == block.gate)
        size = structure[block.inner].size if block.inner is not None and block.inner in structure else 1
        found.setdefault((structure[block.gate].kind, size, block.pairwise, shapes), []).append(block)
    return {blocks[0].gate: blocks for blocks in found.values()}


def _with(
    model: PreTrainedModel, structure: Structure, width: int, blocks: Sequence[Block], units: int | None
) -> PreTrainedModel:
    """A model of some width with so many units in some blocks, and no others."""
    names = {block.gate for block in blocks}
    kept: dict[str, int] = {}
    for block in structure.blocks:
        if block.gate in structure:
            kept[block.gate] = int(block.gate in names)
        if block.inner is not None and block.inner in structure and block.gate in names and units is not None:
            kept[block.inner] = units
    if "hidden" in structure:
        kept["hidden"] = width
    masks = {name: (torch.arange(structure[name].size) < count).double() for name, count in kept.items()}
    return compact(model, Plan.from_values(structure, masks))


def _same_tables(first: PreTrainedModel, other: PreTrainedModel, structure: Structure) -> PreTrainedModel:
    """Let models of one width share the memory of their embedding tables."""
    tables = set(structure.embeddings)
    theirs: Mapping[str, Any] = dict(first.named_parameters())
    for name, parameter in other.named_parameters():
        if name in tables and parameter.shape == theirs[name].shape:
            parameter.data = theirs[name].data
    return other


def _widths(structure: Structure, cut_hidden: bool) -> tuple[int, ...]:
    if "hidden" not in structure:
        return (0,)
    size = structure["hidden"].size
    return tuple(sorted({_round(share * size, size) for share in _WIDTH_SHARES})) if cut_hidden else (size,)


def _unit_levels(structure: Structure, block: Block) -> list[int]:
    if block.inner is None or block.inner not in structure:
        return [1]
    size = structure[block.inner].size
    if size <= _FEW:
        return list(range(1, size + 1))
    return sorted({1, *(_round(share * size, size) for share in _UNIT_SHARES)})


def _round(size: float, most: int) -> int:
    """A multiple of 8 where that is fine enough, and the whole: kernels take longer for what lies between."""
    return most if size >= most else max(1, round(size)) if most < _FINE else max(8, 8 * round(size / 8))


def _rising(grid: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    """Make times rise, strictly, with units and with the width, with as little change as averages of neighbours are."""
    pooled = np.asarray([_pooled(row) for row in grid])
    pooled = np.maximum.accumulate(pooled, axis=0)
    slope = np.linspace(0, 1e-3, pooled.shape[1]) * pooled.max(initial=1.0)
    return tuple(tuple(float(value) for value in row) for row in pooled + slope)


def _pooled(values: Sequence[float]) -> list[float]:
    """Isotonic regression by pooling adjacent violators (Ayer et al., 1955)."""
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    return [float(np.mean(pool)) for pool in pools for _ in pool]

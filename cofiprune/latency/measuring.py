"""Measuring a latency table: compacted models that have some blocks of one size and no others, against one without any.

A block is thus timed inside the model's own forward pass, with the masks, positions and caches that it meets there.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from cofiprune.compaction.slicing import compacted
from cofiprune.data.synthetic import synthetic_inputs
from cofiprune.export.engines import pass_of, version_of
from cofiprune.hooks import evaluating, same_random_state
from cofiprune.latency.table import Conditions, LatencyTable, Surface
from cofiprune.plan import Plan
from cofiprune.record import sizes_to_record
from cofiprune.selection.curves import sizes_of
from cofiprune.structure import Block, Structure
from cofiprune.timing import in_turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WIDTH_SHARES = (0.125, 0.25, 0.5, 1.0)
_UNIT_SHARES = (1 / 32, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
_FEW = 8
"""Largest number of units of which every smaller number is measured."""
_FINE = 64
"""Number of units from which on only multiples of 8 are measured."""
_SECONDS = 1.0
"""For one width and one kind of block, in addition to the five runs of each size."""
_LONG = 0.25
"""Seconds of a forward pass from which on one block is measured alone, and not many alike together."""
_EXPORTED = 4
"""Blocks that are measured together in an engine for which each model is exported: a large graph takes long to."""


def conditions_of(
    model: PreTrainedModel,
    structure: Structure,
    *,
    batch_size: int,
    seq_len: int,
    cut_hidden: bool,
    engine: str = "torch",
) -> Conditions:
    """Return the conditions of a table for this model on the device that it is on.

    :param cut_hidden: measure other widths than the model's, too.
    :param engine: as in the settings; others than torch run on the CPU, in float32 or int8.
    :raises SettingsError: when the engine is not installed.
    """
    exported = engine != "torch"
    on_cpu = exported or model.device.type == "cpu"
    on_cuda = model.device.type == "cuda"
    other = torch.cuda.get_device_name(model.device) if on_cuda else model.device.type
    return Conditions(
        device=_cpu_name() if on_cpu else other,
        threads=torch.get_num_threads() if on_cpu else 0,
        torch=torch.__version__,
        dtype="float32" if exported else str(model.dtype).removeprefix("torch."),
        batch_size=batch_size,
        seq_len=seq_len,
        model=type(model).__name__,
        sizes={**sizes_to_record(structure.sizes), "fixed": sum(spec.fixed for spec in structure.parameters)},
        widths=_widths(structure, cut_hidden),
        engine=engine,
        engine_version=version_of(engine) if exported else "",
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return found or platform.processor() or platform.machine()


def measure(model: PreTrainedModel, structure: Structure, conditions: Conditions) -> LatencyTable:
    """Measure a table; takes from seconds to a few minutes.

    :param model: without fractional masks; it is not changed.
    """
    alike = _alike(structure)
    levels = {name: _unit_levels(structure, blocks[0]) for name, blocks in alike.items()}
    grids: dict[str, list[list[float]]] = {name: [] for name in alike}
    fixed: list[float] = []
    dense = float(np.median(times_of([compacted(model, structure, Plan.from_values(structure, {}))], conditions)))
    most = len(structure.blocks) if conditions.engine == "torch" else _EXPORTED
    together = 1 if dense > _LONG * 1e9 else most
    for width in conditions.widths:
        empty = _with(model, structure, width)
        without = []
        for name, blocks in alike.items():
            chosen = blocks[:together]
            models = [empty, *(_with(model, structure, width, chosen, units) for units in levels[name])]
            times = times_of([_same_tables(empty, each, structure) for each in models], conditions)
            first, *others = np.median(times, axis=1).tolist()
            grids[name].append([max(time - first, 0.0) / len(chosen) for time in others])
            without.append(first)
        fixed.append(float(np.median(without)))
    surfaces = {name: Surface(tuple(levels[name]), _rising(grids[name])) for name in alike}
    stands_for = {block.gate: name for name, blocks in alike.items() for block in blocks}
    return LatencyTable(conditions, dense, tuple(np.maximum.accumulate(fixed).tolist()), surfaces, stands_for)


def times_of(
    models: Sequence[PreTrainedModel], conditions: Conditions, *, seconds: float = _SECONDS
) -> NDArray[np.float64]:
    """Return the nanoseconds of forward passes, in turn: [models, rounds].

    :param models: with one vocabulary; all are moved to the device of the first.
    :param seconds: for all of them together, in addition to five rounds.
    """
    if conditions.engine != "torch":
        return _exported_times(models, conditions, seconds)
    first = models[0]
    inputs: Any = synthetic_inputs(first, batch_size=conditions.batch_size, seq_len=conditions.seq_len)
    own_time = first.device.type == "cpu" and torch.get_num_threads() == 1
    with torch.inference_mode(), evaluating(*models):
        passes = [partial(each.to(first.device), **inputs) for each in models]  # type: ignore[arg-type]
        return 1e9 * np.asarray(in_turn(passes, first.device, seconds=seconds, warmup=2, own_time=own_time))


def _exported_times(models: Sequence[PreTrainedModel], conditions: Conditions, seconds: float) -> NDArray[np.float64]:
    inputs = synthetic_inputs(models[0], batch_size=conditions.batch_size, seq_len=conditions.seq_len)
    inputs = {name: value.cpu().float() if value.is_floating_point() else value.cpu() for name, value in inputs.items()}
    # OpenVINO computes in threads of its own.
    own_time = conditions.threads == 1 and conditions.engine != "openvino"
    with TemporaryDirectory() as name, same_random_state():
        passes = []
        for number, each in enumerate(models):
            folder = Path(name) / str(number)
            folder.mkdir()
            passes.append(pass_of(each, conditions.engine, inputs, folder, threads=conditions.threads))
        found = in_turn(passes, torch.device("cpu"), seconds=seconds, warmup=2, own_time=own_time)
    return 1e9 * np.asarray(found)


def _alike(structure: Structure) -> dict[str, list[Block]]:
    """Blocks of one shape, by the gate of the first among them."""
    found: dict[Any, list[Block]] = {}
    for block in structure.blocks:
        shapes = tuple(spec.shape for spec in structure.parameters if spec.gate == block.gate)
        size = structure.sizes.get(block.inner or "", 1)
        found.setdefault((structure[block.gate].kind, size, block.pairwise, shapes), []).append(block)
    return {blocks[0].gate: blocks for blocks in found.values()}


def _with(
    model: PreTrainedModel, structure: Structure, width: int, blocks: Sequence[Block] = (), units: int = 0
) -> PreTrainedModel:
    """A smaller model of some width, with `units` units in some blocks and no other blocks."""
    kept = sizes_of(structure, width, [units if block in blocks else 0 for block in structure.blocks])
    masks = {name: (torch.arange(structure[name].size) < count).double() for name, count in kept.items()}
    return compacted(model, structure, Plan.from_values(structure, masks))


def _same_tables(first: PreTrainedModel, other: PreTrainedModel, structure: Structure) -> PreTrainedModel:
    """Give a model the embedding tables of another one of its width, so that both are in memory once."""
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
    size = structure.sizes.get(block.inner or "", 1)
    if size <= _FEW:
        return list(range(1, size + 1))
    return sorted({1, *(_round(share * size, size) for share in _UNIT_SHARES)})


def _round(size: float, most: int) -> int:
    """The nearest multiple of 8 where that is fine enough, because kernels take longer for other sizes; or all."""
    return most if size >= most else max(1, round(size)) if most < _FINE else max(8, 8 * round(size / 8))


def _rising(grid: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    """Make times rise strictly with the units, and not fall with the width, by averaging neighbours out of order."""
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

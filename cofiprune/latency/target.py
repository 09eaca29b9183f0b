"""Targets in time: a speed-up or milliseconds by a latency table, and the multiple of sizes that a device prefers.

A table is measured once for each set of conditions, and kept in a file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cofiprune.compaction.slicing import compacted
from cofiprune.errors import TargetError
from cofiprune.files import digest
from cofiprune.latency.measuring import measure, times_of
from cofiprune.latency.table import FORMAT_VERSION, Conditions, LatencyCost, LatencyTable
from cofiprune.plan import Plan
from cofiprune.selection.target import Target
from cofiprune.structure import Structure
from cofiprune.timing import in_turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SLACK = 0.05
"""Relative deviation from the time asked for beyond which a compacted model is reported with a warning."""
_SECONDS = 3.0
"""For measuring a pruned model against the dense one."""

CANDIDATES = (1, 8, 16, 32, 64)
_SIZES = (75, 109, 171, 235, 299, 365)
"""Sizes as pruning leaves them: multiples of none but the first candidate. Others are measured at the nearest."""
_GAIN = 0.02
"""Time per unit that a coarser multiple has to save, because it leaves fewer sizes to choose among."""
_COARSEST = 8
"""A multiple may be at most this fraction of a block's units."""
_SECONDS_OF_PRODUCTS = 1.0


def latency_target(
    model: PreTrainedModel,
    structure: Structure,
    name: str,
    value: float,
    conditions: Conditions,
    *,
    cache: str | Path | None = None,
) -> Target:
    """Make a target in time for the device that the model is on.

    :param name: `target_speedup` or `target_latency_ms`.
    :param value: above 1 for a speed-up; milliseconds per batch above 0.
    :param conditions: of the measurement; see `conditions_of`.
    :param cache: see `table_for`.
    :raises TargetError: when the dense model reaches the target already, or the cache is of another device.
    """
    if name == "target_speedup" and value <= 1:
        raise TargetError(f"target_speedup={value:g}: it is the dense model's time over the pruned one's, above 1")
    table = table_for(model, structure, conditions, cache)
    dense = compacted(model, structure, Plan.from_values(structure, {}))
    total = round(table.dense)

    def measured(small: PreTrainedModel) -> float:
        # In proportion to the dense model in the same round: a busy machine slows down both.
        theirs, ours = times_of([dense, small], conditions, seconds=_SECONDS)
        return float(np.median(ours / theirs * total if name == "target_speedup" else ours))

    setting = f"at batch {conditions.batch_size} and length {conditions.seq_len} on {conditions.device}"
    setting += "" if conditions.engine == "torch" else f" in {conditions.engine}"
    cost = partial(LatencyCost, table)
    return Target.create(name, value, cost, total, setting=setting, slack=_SLACK, measure=measured)


def cache_folder() -> Path:
    """Return the default folder for latency tables: under `XDG_CACHE_HOME`, or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cofiprune" / "latency"


def table_for(
    model: PreTrainedModel, structure: Structure, conditions: Conditions, cache: str | Path | None = None
) -> LatencyTable:
    """Return the latency table of some conditions from the cache; one that is not there is measured and kept.

    :param cache: a folder, or one file that ends in `.json`; None for `cache_folder`.
    :raises TargetError: when that one file is of another device, length or model, or no table at all.
    """
    path = cache_folder() if cache is None else Path(cache)
    one_file = path.suffix == ".json"
    if not one_file:
        path = path / f"{digest([FORMAT_VERSION, asdict(conditions)])[:16]}.json"
    try:
        if path.exists():
            return LatencyTable.load(path, conditions)
    except TargetError:
        if one_file:
            raise
    table = measure(model, structure, conditions)
    try:
        table.save(path)
    except OSError as error:
        if one_file:
            raise TargetError(f"latency_cache: {path} cannot be written: {error}") from error
    return table


def best_multiple(model: PreTrainedModel, structure: Structure, *, rows: int) -> int:
    """Return the smallest multiple for sizes at which a unit takes about as little time as at any.

    Kernels work in tiles, whose size depends on the processor, the precision and the number of rows. A size between two
    multiples of it costs as much as the next one, or more.

    :param rows: of the activations: batch size times length.
    """
    widest = max((group.size for group in structure.values() if group.kind == "intermediate"), default=1)
    width = structure["hidden"].size if "hidden" in structure else int(getattr(model.config, "hidden_size", widest))
    candidates = tuple(each for each in CANDIDATES if each == 1 or each * _COARSEST <= widest)
    threads = torch.get_num_threads() if model.device.type == "cpu" else 0
    return _timed_multiple(model.device, model.dtype, threads, rows, width, candidates)


def cheapest(times: Mapping[int, float], candidates: Sequence[int]) -> int:
    """Return the smallest candidate whose sizes take about as little time per unit as those of any, by seconds."""
    per_unit = {each: float(np.mean([times[size] / size for size in sizes_of(each)])) for each in candidates}
    least = min(per_unit.values())
    return min(each for each, value in per_unit.items() if value <= (1 + _GAIN) * least)


def sizes_of(multiple: int) -> list[int]:
    """Return the sizes at which a multiple is measured."""
    return [max(multiple, multiple * round(size / multiple)) for size in _SIZES]


@lru_cache(maxsize=64)
def _timed_multiple(
    device: torch.device, dtype: torch.dtype, threads: int, rows: int, width: int, candidates: tuple[int, ...]
) -> int:
    sizes = sorted({size for each in candidates for size in sizes_of(each)})
    with torch.inference_mode():
        states = torch.ones(rows, width, dtype=dtype, device=device)
        passes = []
        for size in sizes:
            weights = [torch.ones(shape, dtype=dtype, device=device) for shape in ((size, width), (width, size))]
            passes.append(partial(_two_products, states, *weights))
        seconds = in_turn(passes, device, seconds=_SECONDS_OF_PRODUCTS, own_time=threads == 1)
    times = dict(zip(sizes, np.median(seconds, axis=1).tolist(), strict=True))
    return cheapest(times, candidates)


def _two_products(states: Tensor, into: Tensor, out_of: Tensor) -> Tensor:
    """The products of a feed-forward block: [rows, width] to [rows, size] and back."""
    return F.linear(F.linear(states, into), out_of)

"""Targets in time: a speed-up, or milliseconds."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cofiprune.compaction import compact
from cofiprune.errors import TargetError
from cofiprune.latency.cache import table_for
from cofiprune.latency.cost import LatencyCost
from cofiprune.latency.measuring import Progress, conditions_of, timed
from cofiprune.latency.table import Conditions
from cofiprune.plan import Plan
from cofiprune.selection.target import Target
from cofiprune.structure import Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SLACK = 0.05
"""How far from the time asked for a compacted model may be measured; beyond that a warning says so."""
_SECONDS = 3.0
"""For measuring what was decided against the whole model."""


def latency_target(
    model: PreTrainedModel,
    structure: Structure,
    name: str,
    value: float,
    *,
    batch_size: int,
    seq_len: int,
    cut_hidden: bool,
    cache: str | Path | None = None,
    on_progress: Progress | None = None,
) -> Target:
    """Make a target in time, for the device that the model is on; measures the latency table unless it is kept.

    :param name: `target_speedup` or `target_latency_ms`.
    :param value: above 1 for a speed-up; milliseconds per batch above 0.
    :param cut_hidden: hidden dimensions may be removed.
    :raises TargetError: when it is met already, or the cache is of another device.
    """
    if name == "target_speedup" and value <= 1:
        raise TargetError(f"target_speedup={value:g}: it is the dense model's time over the pruned one's, above 1")
    conditions = conditions_of(model, structure, batch_size=batch_size, seq_len=seq_len, cut_hidden=cut_hidden)
    table = table_for(model, structure, conditions, cache, on_progress)
    whole = compact(model, Plan.from_values(structure, {}))
    total = round(table.dense)
    setting = f"at batch {batch_size} and length {seq_len} on {conditions.device}"
    measure = partial(_measured, whole=whole, conditions=conditions, relative=name == "target_speedup", total=total)
    cost = partial(LatencyCost, table)
    target = Target.create(name, value, cost, total, setting=setting, slack=_SLACK, measure=measure)
    if target.budget >= total:
        raise TargetError(f"target_latency_ms={value:g}: the dense model takes {total / 1e6:.3g} ms {setting} already")
    return target


def _measured(
    small: PreTrainedModel, *, whole: PreTrainedModel, conditions: Conditions, relative: bool, total: int
) -> float:
    """Nanoseconds of a smaller model, in the median.

    :param relative: take them by the whole model's in the same round, whatever else the machine does then.
    """
    with timed(whole, conditions, seconds=_SECONDS) as stopwatch:
        ours, dense = stopwatch([small, whole])
    return float(np.median(ours / dense * total if relative else ours))

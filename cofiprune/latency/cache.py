"""Where latency tables are kept, so that each is measured once: one file for each set of conditions."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cofiprune.errors import TargetError
from cofiprune.latency.measuring import Progress, measure
from cofiprune.latency.table import Conditions, LatencyTable
from cofiprune.structure import Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def cache_folder() -> Path:
    """The folder where tables go by default: under `XDG_CACHE_HOME`, or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cofiprune" / "latency"


def table_for(
    model: PreTrainedModel,
    structure: Structure,
    conditions: Conditions,
    cache: str | Path | None = None,
    on_progress: Progress | None = None,
) -> LatencyTable:
    """Return a table for these conditions: the one that is kept, or one that is measured now, and kept.

    :param cache: a folder, or one file that ends in `.json`; None for `cache_folder`.
    :raises TargetError: when that one file is of another device, length or model, or no table at all.
    """
    path = _path(conditions, cache)
    alone = cache is not None and Path(cache).suffix == ".json"
    if path.exists():
        try:
            table = LatencyTable.load(path)
        except TargetError:
            if alone:
                raise
        else:
            different = conditions.difference(table.conditions)
            if different is None:
                return table
            if alone:
                raise TargetError(
                    f"the latency table in {path} was not measured for this: {different}. Delete it to measure "
                    "anew, or name another file in latency_cache"
                )
    table = measure(model, structure, conditions, on_progress)
    try:
        table.save(path)
    except OSError as error:
        if alone:
            raise TargetError(f"latency_cache: {path} cannot be written: {error}") from error
    return table


def _path(conditions: Conditions, cache: str | Path | None) -> Path:
    folder = cache_folder() if cache is None else Path(cache)
    if cache is not None and folder.suffix == ".json":
        return folder
    text = json.dumps(asdict(conditions), sort_keys=True)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"

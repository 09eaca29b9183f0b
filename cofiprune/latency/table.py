"""The latency table: measured times and the conditions that they hold for. Pure data, saved as JSON.

A model's time is modelled as the sum of its blocks' times and a fixed part: embeddings, head, the loop over the layers.
A block's time is a surface over its inner units and the hidden width, measured on a grid and linear in between.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from cofiprune.errors import TargetError, explained

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Conditions:
    """The conditions of a measurement; under any others it has to be repeated."""

    device: str
    threads: int
    """CPU threads of torch; 0 on other devices."""
    torch: str
    dtype: str
    batch_size: int
    seq_len: int
    """As requested: tokens, or frames of audio; images have a fixed length."""
    model: str
    """The model's class."""
    sizes: Mapping[str, Any]
    """Sizes of its groups, one entry per kind, and the number of elements that depend on no group."""
    widths: tuple[int, ...]
    """Measured hidden sizes, ascending."""

    def difference(self, other: Conditions) -> str | None:
        """Return the first difference from other conditions in words, or None."""
        for field in fields(self):
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            if json.dumps(ours, sort_keys=True) != json.dumps(theirs, sort_keys=True):
                return f"{field.name} is {theirs} there and {ours} here"
        return None


@dataclass(frozen=True)
class Surface:
    """Nanoseconds of one kind of block by hidden width and inner units."""

    units: tuple[int, ...]
    """Measured numbers of inner units, ascending, from 1 to all."""
    times: tuple[tuple[float, ...], ...]
    """[widths, units]; does not decrease along either."""


@dataclass(frozen=True)
class LatencyTable:
    """Times of the blocks of one model on one device."""

    conditions: Conditions
    dense: float
    """Nanoseconds of the dense model."""
    fixed: tuple[float, ...]
    """Nanoseconds without any block, by hidden width."""
    surfaces: Mapping[str, Surface]
    """By the gate of the first block of each shape."""
    stands_for: Mapping[str, str]
    """For the gate of every block, the gate in `surfaces`."""

    def save(self, path: Path) -> None:
        """Write the table as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = {"format_version": FORMAT_VERSION, **asdict(self)}
        path.write_text(json.dumps(entries, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a table.

        :raises TargetError: when the file is none, or one of another version.
        """
        from pydantic import TypeAdapter  # imported late: only targets in time need it

        problem = f"{path} is no latency table that can be read; delete it"
        with explained(TargetError, problem, OSError, ValueError, KeyError, TypeError, AttributeError):
            entries = json.loads(path.read_text(encoding="utf-8"))
            version = entries.pop("format_version")
            table: Self = TypeAdapter(cls).validate_python(entries)
        if version != FORMAT_VERSION:
            raise TargetError(f"{path} is a latency table in format {version}; this version reads {FORMAT_VERSION}")
        return table

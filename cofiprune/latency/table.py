"""The latency table: what was measured, and under which conditions. Pure data, saved as JSON.

A model's time is taken as the sum of its blocks' times and a fixed part (embeddings, head, the loop over the layers). A
block's time is a surface over its inner units and the hidden width, measured at a grid and linear in between.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from cofiprune.errors import TargetError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Conditions:
    """What a measurement holds for; with anything else it is another one."""

    device: str
    threads: int
    """Threads of the CPU that torch computes with; 0 on other devices."""
    torch: str
    dtype: str
    batch_size: int
    seq_len: int
    """As it was asked for: tokens, or frames of audio; images have the length that they have."""
    model: str
    """The model's class."""
    sizes: Mapping[str, Any]
    """Sizes of its groups, one entry per kind, and shapes that do not follow from them."""
    widths: tuple[int, ...]
    """Hidden sizes that were measured; ascending."""

    def difference(self, other: Conditions) -> str | None:
        """The first thing in which other conditions differ, in words; None where they are the same."""
        for field in fields(self):
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            if json.dumps(ours, sort_keys=True) != json.dumps(theirs, sort_keys=True):
                return f"{field.name} is {theirs} there and {ours} here"
        return None


@dataclass(frozen=True)
class Surface:
    """Nanoseconds of one kind of block by hidden width and inner units."""

    units: tuple[int, ...]
    """Numbers of inner units that were measured; ascending, from 1 to all."""
    times: tuple[tuple[float, ...], ...]
    """[widths, units]; does not fall along either."""


@dataclass(frozen=True)
class LatencyTable:
    """Times of the blocks of one model on one device."""

    conditions: Conditions
    dense: float
    """Nanoseconds of the model as it is."""
    fixed: tuple[float, ...]
    """Nanoseconds without any block, by hidden width."""
    surfaces: Mapping[str, Surface]
    """By the gate of a block that stands for all like it."""
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

        :raises TargetError: when the file is none, or one of a newer version.
        """
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
            version = entries.pop("format_version")
            if version != FORMAT_VERSION:
                raise TargetError(f"{path} is a latency table in format {version}; this version reads {FORMAT_VERSION}")
            conditions = entries["conditions"]
            surfaces = {
                gate: Surface(tuple(each["units"]), tuple(map(tuple, each["times"])))
                for gate, each in entries["surfaces"].items()
            }
            return cls(
                Conditions(**{**conditions, "widths": tuple(conditions["widths"])}),
                float(entries["dense"]),
                tuple(entries["fixed"]),
                surfaces,
                dict(entries["stands_for"]),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, TargetError):
                raise
            raise TargetError(f"{path} is no latency table that can be read ({error!r}); delete it") from error

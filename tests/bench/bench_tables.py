"""Writes what the benchmarks found into the tables of a page, and leaves everything else on it as it is.

The page says where each table goes; between the two marks everything is the benchmarks' own:

    <!-- bench: NAME -->
    <!-- cpu -->
    table of the last run on a CPU
    <!-- gpu -->
    table of the last run on a GPU
    <!-- /bench -->

A run replaces the part of the kind of device that it ran on.
"""

from __future__ import annotations

import datetime
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

DEVICES = ("cpu", "gpu")
_REGION = re.compile(r"(?P<begin>^<!-- bench: (?P<name>[\w-]+) -->\n)(?P<body>.*?)^<!-- /bench -->$", re.M | re.S)
_MARK = re.compile(r"^<!-- (?:bench: [\w-]+|/bench) -->$", re.M)
_PART = re.compile(r"^<!-- (cpu|gpu) -->\n", re.M)


@dataclass(frozen=True)
class Table:
    """What one benchmark found."""

    name: str
    """Of the place on the page."""
    kind: str
    """Of device: "cpu" or "gpu"."""
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    about: str
    """Date, device and versions."""

    def __post_init__(self) -> None:
        if self.kind not in DEVICES:
            raise ValueError(f"a table is of a {' or a '.join(DEVICES)}, not of a {self.kind!r}")
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"table {self.name!r} has {len(self.header)} columns and a row of {len(row)}: {row}")

    def __str__(self) -> str:
        lines = [f"| {' | '.join(cells)} |" for cells in (self.header, ["---"] * len(self.header), *self.rows)]
        return "\n".join([f"{self.about}:", "", *lines])


def about(device: torch.device, threads: int) -> str:
    """Date, device and versions of a measurement that is made now."""
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = f"{cpu_name()}, {threads} {'thread' if threads == 1 else 'threads'}"
    versions = f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"
    return f"{datetime.date.today().isoformat()}, {where}, {versions}"


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def places(page: str) -> dict[str, tuple[int, int]]:
    """Where on a page each table goes: by name, begin and end of what lies between its marks.

    :raises ValueError: when marks do not come in pairs, or two places have one name.
    """
    found = {}
    for match in _REGION.finditer(page):
        name = match["name"]
        if _MARK.search(match["body"]):
            raise ValueError(f"the marks of table {name!r} do not come as a pair")
        if name in found:
            raise ValueError(f"there are two places for table {name!r}")
        found[name] = match.span("body")
    if len(_MARK.findall(page)) != 2 * len(found):
        raise ValueError("the marks of some table do not come as a pair")
    return found


def check_place(page: str, name: str) -> None:
    """Make sure that a table has a place.

    :raises ValueError: when it has none.
    """
    if name not in (known := places(page)):
        raise ValueError(f"there is no place for table {name!r}: no <!-- bench: {name} -->; tables: {', '.join(known)}")


def rewritten(page: str, tables: Iterable[Table]) -> str:
    """Return a page with these tables in their places; those of other devices stay.

    :raises ValueError: when a table has no place, or a place holds what no benchmark wrote.
    """
    for table in tables:
        check_place(page, table.name)
        begin, end = places(page)[table.name]
        parts = {**_parts(table.name, page[begin:end]), table.kind: str(table)}
        body = "".join(f"<!-- {kind} -->\n{parts[kind]}\n\n" for kind in DEVICES if kind in parts)
        page = page[:begin] + body + page[end:]
    return page


def write(path: Path, tables: Sequence[Table]) -> None:
    """Rewrite the tables of a file."""
    before = path.read_text(encoding="utf-8")
    after = rewritten(before, tables)
    if after != before:
        path.write_text(after, encoding="utf-8")


def _parts(name: str, body: str) -> dict[str, str]:
    """What a place holds, by kind of device."""
    first, *rest = _PART.split(body)
    if first.strip():
        raise ValueError(f"what stands in the place of table {name!r} belongs to no device: {first.strip()[:60]!r}")
    return {kind: text.strip("\n") for kind, text in zip(rest[::2], rest[1::2], strict=True)}

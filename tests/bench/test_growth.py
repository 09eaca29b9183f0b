"""How time and memory of the stages grow with rows, layers and width: exponents fitted to three sizes of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fresh_process import STATUS, measured

pytestmark = [
    pytest.mark.bench,
    pytest.mark.skipif(not STATUS.exists(), reason="memory is measured where the kernel tells it in /proc"),
]

SCRIPT = Path(__file__).with_name("growth.py")
BY = {"rows": (1, 4, 16), "layers": (6, 12, 24), "width": (384, 768, 1024)}
ROWS = {"one_shot": 128, "recovery": 512, "stream": 512, "batches": 16_000, "vocabulary": 2000}
"""The least rows of a stage, where it is not 4,000. One shot looks at no more than 10,000 positions, or four for each
input of the widest matrix, however many there are."""
LAYERS, WIDTH = 2, 128
"""Of the model where others grow, small enough for all of it to take minutes."""
WIDE = {"one_shot": (320, 1), "recovery": (320, 1)}
"""Rows and layers where the width grows."""
GROWS = {
    "one_shot": ("rows", "layers", "width"),
    "recovery": ("rows", "layers", "width"),
    "stream": ("rows",),
    "reading": ("rows",),
    "batches": ("rows",),
    "stream_batches": ("rows",),
    "vocabulary": ("rows",),
}
PLACES = ("rows", "layers", "width")
LINEAR = 1.15
"""Exponents above it are no longer linear, noise included."""


def exponent(sizes: list[float], values: list[float], least: float) -> float:
    """The slope of a line through the logarithms; less than `least` is noise."""
    logarithms = [math.log(max(value, least)) for value in values]
    return float(np.polyfit([math.log(size) for size in sizes], logarithms, 1)[0])


def case(stage: str, by: str, size: int) -> str:
    """One size of a stage, in the words of `growth.py`."""
    rows, layers = WIDE[stage] if by == "width" else (ROWS.get(stage, 4000), LAYERS)
    given = {"rows": rows, "layers": layers, "width": WIDTH}
    given[by] = rows * size if by == "rows" else size
    return ",".join([stage, *map(str, given.values())])


def test_growth(table: Callable[..., Any]) -> None:
    hand_in = table("growth", on=torch.device("cpu"))
    cases = {(stage, by): [case(stage, by, size) for size in BY[by]] for stage, grows in GROWS.items() for by in grows}
    measurements = measured(*(each for named in cases.values() for each in named), script=SCRIPT)
    rows, found = [], {}
    for (stage, by), named in cases.items():
        sizes = [float(each.split(",")[1 + PLACES.index(by)]) for each in named]
        seconds, peaks = ([measurements[each][name] for each in named] for name in ("seconds", "peak"))
        found[stage, by] = exponent(sizes, seconds, 0.01), exponent(sizes, peaks, 4.0)
        rows.append([
            stage.replace("_", " "), by, ", ".join(f"{size:,.0f}" for size in sizes),
            ", ".join(f"{value:.2f}" for value in seconds), f"{found[stage, by][0]:.2f}",
            ", ".join(f"{value:.0f}" for value in peaks), f"{found[stage, by][1]:.2f}",
        ])  # fmt: skip
    hand_in(["stage", "grows", "sizes", "seconds of a core", "exponent", "MiB beyond", "exponent"], rows)
    for (stage, by), (time, memory) in found.items():
        if by != "width":  # matrices grow with its square, their inverses with its cube
            assert time < LINEAR, (stage, by)
            assert memory < LINEAR, (stage, by)
    assert found["stream", "rows"][1] < 0.3

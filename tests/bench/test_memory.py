"""Peak memory of a step with gates and a teacher beside that of a plain step, each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fresh_process import STATUS, measured

pytestmark = [
    pytest.mark.bench,
    pytest.mark.skipif(not STATUS.exists(), reason="memory is measured where the kernel tells it in /proc"),
]


def test_memory_of_steps(table: Callable[..., Any]) -> None:
    hand_in = table("training-memory", on=torch.device("cpu"))
    plain, bare, gates = measured("plain"), measured("plain", "without dropout"), measured("gates")
    floor = plain["peak"] + gates["teacher"]
    strict = bare["peak"] + gates["teacher"]

    def row(name: str, peak: float) -> list[str]:
        return [name, f"{peak:.0f}", f"{peak / floor:.2f}", f"{peak / strict:.2f}"]

    hand_in(
        ["", "MiB", "by plain step + teacher", "by the same without dropout"],
        [
            row("plain step", plain["peak"]),
            row("plain step without dropout", bare["peak"]),
            row("plain step + the teacher's weights", floor),
            row("step of gates and weights with a teacher", gates["peak"]),
            row("`prune` with nothing but such steps", gates["call"]),
        ],
    )
    assert gates["peak"] < 1.15 * floor
    assert gates["call"] < 1.25 * floor

"""The laws, for every family that ships here: all heads, all choices of units, random masks, float64, padding."""

from __future__ import annotations

from importlib.metadata import entry_points

import pytest

from cofiprune.adapter import ENTRY_POINT_GROUP, Adapter
from cofiprune.conformance import check_adapter


def families() -> list[Adapter]:
    found = {point.value: point.load() for point in entry_points(group=ENTRY_POINT_GROUP)}
    return [found[value] for value in sorted(found)]


@pytest.mark.parametrize("adapter", families(), ids=lambda adapter: adapter.model_types[0])
def test_every_law_holds_for_every_head_and_choice_of_units(adapter: Adapter) -> None:
    report = check_adapter(adapter)
    assert len(report.choices) == 15
    assert len(report.heads) >= 5 * len(adapter.model_types)
    assert not report.skipped
    assert report.largest_difference < 1e-10

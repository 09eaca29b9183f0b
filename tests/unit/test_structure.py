"""The structure: groups in canonical order, selection by unit kinds, errors that say what is possible."""

from __future__ import annotations

import pytest

import cofiprune
from cofiprune.errors import StructureError
from cofiprune.structure import Side, Structure, unit_of
from small import build


@pytest.fixture(scope="module")
def structure() -> Structure:
    return cofiprune.structure(build("BertForSequenceClassification"))


def test_groups_come_in_canonical_order_with_their_sizes(structure: Structure) -> None:
    assert dict(structure.sizes) == {
        "hidden": 24, "layers.0.attention": 1, "layers.0.heads": 4, "layers.0.ffn": 1, "layers.0.intermediate": 34,
        "layers.1.attention": 1, "layers.1.heads": 4, "layers.1.ffn": 1, "layers.1.intermediate": 34,
    }  # fmt: skip
    assert list(structure) == list(structure.sizes)
    assert len(structure) == 9
    assert structure["layers.1.heads"].layer == 1


def test_every_parameter_is_listed_in_the_order_of_the_model(structure: Structure) -> None:
    model = build("BertForSequenceClassification")
    assert [(spec.name, spec.shape) for spec in structure.parameters] == [
        (name, tuple(value.shape)) for name, value in model.named_parameters()
    ]


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ("hidden", ["hidden"]),
        ("layer", ["layers.0.attention", "layers.0.ffn", "layers.1.attention", "layers.1.ffn"]),
        (("head", "hidden"), ["hidden", "layers.0.heads", "layers.1.heads"]),
        (["intermediate"], ["layers.0.intermediate", "layers.1.intermediate"]),
    ],
)
def test_units_select_groups(structure: Structure, units: str | tuple[str, ...], expected: list[str]) -> None:
    assert [group.name for group in structure.select(units)] == expected


def test_no_units_selects_all(structure: Structure) -> None:
    assert structure.select() == structure.groups


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ("heads", "unknown unit kind 'heads'; choose among layer, head, intermediate, hidden. Did you mean 'head'"),
        ((), "units is empty; choose among layer, head"),
        (("head", "neuron"), "unknown unit kind 'neuron'"),
    ],
)
def test_wrong_units_are_named(structure: Structure, units: str | tuple[str, ...], message: str) -> None:
    with pytest.raises(StructureError, match=message):
        structure.select(units)


def test_a_wrong_group_name_gets_near_misses(structure: Structure) -> None:
    with pytest.raises(StructureError, match=r"no group 'layers.0.head'.*Did you mean 'layers.0.heads'"):
        structure["layers.0.head"]
    assert "layers.0.head" not in structure


def test_a_side_is_copies_units_block() -> None:
    assert Side("layers.0.heads", units=4, copies=3, block=6).length == 72


def test_each_kind_belongs_to_a_unit_kind() -> None:
    assert [unit_of(kind) for kind in ("hidden", "attention", "heads", "ffn", "intermediate")] == [
        "hidden",
        "layer",
        "head",
        "layer",
        "intermediate",
    ]

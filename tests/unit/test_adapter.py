"""Adapters: which one serves a model, and what is no adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import cofiprune
from cofiprune.adapter import Adapter, adapter_for, family, norm
from cofiprune.errors import AdapterError, CofipruneError
from cofiprune_adapters.bert import adapter as bert
from small import build

Register = Callable[[Adapter], None]


def test_a_registered_adapter_takes_precedence(register: Register) -> None:
    model = build("BertModel")
    mine = family("bert")(lambda config: replace(bert.describe(config), refused={"hidden": "mine"}))
    assert "hidden" in cofiprune.structure(model)
    register(mine)
    assert adapter_for(model) is mine
    assert "hidden" not in cofiprune.structure(model)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [(Adapter, "pass an instance"), ("bert", "takes an instance"), (Adapter(), "must be a tuple")],
)
def test_what_is_no_adapter_is_not_registered(adapter: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        cofiprune.register_adapter(adapter)


def test_a_layer_list_elsewhere_is_an_error() -> None:
    moved = family("bert")(lambda config: replace(bert.describe(config), layers="encoder.layers"))
    with pytest.raises(CofipruneError, match=r"no list of layers at 'encoder.layers'"):
        moved.structure(build("BertModel"))


def test_rows_of_norms_are_norms() -> None:
    structure = cofiprune.structure(build("BertModel"))
    assert len(structure.norms) == 5
    assert norm("a.b", kind="rms").norm == "rms"

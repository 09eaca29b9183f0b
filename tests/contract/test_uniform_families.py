"""Uniform models of every family that declares them: the smaller configuration builds what compaction leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

import cofiprune
from cofiprune.compaction import compact
from cofiprune.compaction.uniform_config import uniform_units
from cofiprune.conformance import specimens
from cofiprune.plan import Plan
from cofiprune.structure import Structure

from .test_published_configurations import CASES, model_of


def without_first_layer(structure: Structure) -> dict[str, Any]:
    return {name: [0] for name in ("layers.0.attention", "layers.0.ffn")}


def narrower(structure: Structure, units: tuple[str, ...]) -> dict[str, Any]:
    """Masks that take the same from every layer: feed-forward dimensions, and the first head with its dimensions."""
    found = {}
    heads = structure["layers.0.heads"].size if "layers.0.heads" in structure else 1
    for name, group in structure.items():
        if group.unit in units and group.kind in ("intermediate", "hidden", "heads"):
            gone = {"intermediate": 10, "heads": 1, "hidden": group.size // heads}[group.kind]
            if group.kind != "heads" or "hidden" in units:
                found[name] = [0] * gone + [1] * (group.size - gone)
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name, (model_type, _) in CASES.items() if model_type in CONFIG_MAPPING])
def test_smaller_configuration_builds_what_compaction_leaves(name: str) -> None:
    try:
        model = model_of(name).double()
        structure = cofiprune.structure(model)
    except cofiprune.CofipruneError:
        pytest.skip("it cannot be pruned at this size")
    if structure.config_sizes is None or len(structure.layers) < 2:
        with pytest.raises(cofiprune.CofipruneError, match="cannot state smaller sizes|uniform"):
            compact(model, Plan.from_values(structure, {}), uniform=True)
        return
    batch = {
        key: value.double() if value.is_floating_point() else value
        for key, value in specimens.inputs(model, torch.Generator().manual_seed(2)).items()
    }
    for masks in (without_first_layer(structure), narrower(structure, uniform_units(model, structure, None))):
        plan = Plan.from_values(
            structure, {key: torch.tensor(value, dtype=torch.float64) for key, value in masks.items()}
        )
        expected = specimens.outputs(compact(model, plan), batch)
        found = specimens.outputs(compact(model, plan, uniform=True), batch)
        assert all(torch.equal(found[key], value) for key, value in expected.items())

"""Hidden dimensions in one shot: which go, what the norms make up for, and that the budget is met all the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cofiprune import compact
from cofiprune.adapter import structure as structure_of
from cofiprune.data.batches import to_model
from cofiprune.oneshot.loss_curves import hidden_curve
from cofiprune.oneshot.reconstruction import Reconstruction, norms_outside
from cofiprune.oneshot.regression import AffineFit
from cofiprune.oneshot.with_data import RoundPruning
from cofiprune.plan import Plan
from cofiprune.selection.target import Target
from small import build, cost_of, padded_batches

ALL = ("layer", "head", "intermediate", "hidden")
SIZES = {"intermediate_size": 48, "num_labels": 3}


def bert():
    return build("BertForSequenceClassification", **SIZES).eval()


def vit():
    return build("ViTForImageClassification", image_size=16, patch_size=4, **SIZES).eval()


def images(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"pixel_values": torch.randn(8, 3, 16, 16, generator=generator)} for _ in range(count)]


def logits(model, batches):
    with torch.no_grad():
        return torch.cat([model(**batch).logits for batch in batches])


def silence(model, dimensions):
    """Let nothing read some hidden dimensions."""
    structure = structure_of(model)
    for spec in structure.parameters:
        for axis, side in enumerate(spec.sides):
            if (
                side is not None
                and side.group == "hidden"
                and len(spec.shape) == 2
                and axis == 1
                and spec.applications != (0, 0)
            ):
                with torch.no_grad():
                    model.get_parameter(spec.name)[:, dimensions] = 0.0
    return model


def test_dimensions_that_nothing_reads_go_first():
    model = silence(bert(), [3, 17, 20])
    found = hidden_curve(model, structure_of(model), padded_batches(model), seed=0)
    assert set(found.order[:3]) == {3, 17, 20}
    assert sorted(found.order) == list(range(24))
    assert list(found.loss) == sorted(found.loss)
    assert found.loss[2] < 1e-3 * found.loss[-1]


@pytest.mark.parametrize(("make", "rows"), [(bert, padded_batches), (vit, lambda model: images())], ids=["post", "pre"])
def test_hidden_dimensions_go_where_they_are_asked_for_and_the_budget_is_met(make, rows):
    model = silence(make(), [3, 17, 20])
    structure, cost = cost_of(model)
    sizes = structure.sizes
    one_head = cost.exact(sizes) - cost.exact({**sizes, "layers.0.heads": 3})
    plan, small = RoundPruning(model, structure, rows(model), Target.of(structure, 0.6), units=ALL).run()
    assert abs(cost.exact(plan.kept) - 0.4 * cost.exact(structure.sizes)) <= one_head
    assert 0 < plan.kept["hidden"] < 24
    shapes = {name: value.shape for name, value in compact(model, plan).state_dict().items()}
    assert {name: value.shape for name, value in small.state_dict().items()} == shapes


@pytest.mark.parametrize(("make", "rows"), [(bert, padded_batches), (vit, lambda model: images())], ids=["post", "pre"])
def test_repair_brings_a_narrower_model_nearer(make, rows):
    model = make()
    batches = [to_model(batch, model) for batch in rows(model)]
    structure = structure_of(model)
    order = hidden_curve(model, structure, batches, seed=0).order
    values = torch.ones(24, dtype=torch.float64)
    values[list(order[:6])] = 0.0
    plan = Plan.from_values(structure, {"hidden": values})
    bare = compact(model, plan).eval()
    small = copy.deepcopy(bare)
    Reconstruction(model, structure, small, plan, batches, weights={}).run()
    wanted = logits(model, batches)
    before, after = ((logits(one, batches) - wanted).norm() for one in (bare, small))
    assert after < 0.8 * before
    norms = {norm.module for norm in structure.norms}
    changed = [
        path for path in norms if not torch.equal(*(one.get_parameter(f"{path}.weight") for one in (bare, small)))
    ]
    assert set(changed) == norms


def test_the_norms_stay_where_no_hidden_dimension_goes():
    model = bert()
    structure = structure_of(model)
    plan, small = RoundPruning(model, structure, padded_batches(model), Target.of(structure, 0.4)).run()
    assert plan.kept["hidden"] == 24
    kept = {norm.module for norm in structure_of(small).norms}
    assert all(
        torch.equal(small.get_parameter(f"{path}.weight"), model.get_parameter(f"{path}.weight")) for path in kept
    )


def test_norms_outside_of_the_layers_are_told_apart_by_when_they_run():
    model = bert()
    batch = to_model(padded_batches(model)[0], model)
    assert norms_outside(model, structure_of(model), batch) == (["bert.embeddings.LayerNorm"], [])
    model = vit()
    assert norms_outside(model, structure_of(model), images()[0]) == ([], ["vit.layernorm"])


@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_takes_over_factors_and_shifts(bias):
    generator = torch.Generator().manual_seed(0)
    norm = nn.LayerNorm(5, bias=bias).double()
    inputs = torch.randn(200, 5, generator=generator, dtype=torch.float64)
    factor = torch.rand(5, generator=generator, dtype=torch.float64) + 0.5
    shift = torch.randn(5, generator=generator, dtype=torch.float64) * bias
    with torch.no_grad():
        wanted = norm(inputs) * factor + shift
        fit = AffineFit(5)
        for part in range(0, 200, 50):
            fit.add(norm(inputs[part : part + 50]), wanted[part : part + 50])
        fit.correct(norm)
        assert torch.allclose(norm(inputs), wanted, atol=5e-3)


def test_frozen_norms_stay():
    norm = nn.LayerNorm(5)
    norm.weight.requires_grad_(False)
    fit = AffineFit(5)
    fit.add(torch.randn(20, 5), torch.randn(20, 5))
    fit.correct(norm)
    assert torch.equal(norm.weight, torch.ones(5))

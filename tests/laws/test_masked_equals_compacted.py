"""The law over everything, for models and masks that nobody has thought of: masked == compacted."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import cofiprune
from cofiprune.conformance import specimens
from cofiprune.structure import Structure

# The same examples on every machine: a failure is to be seen by all, or by none.
LAW = settings(derandomize=True, deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))

EXACT = 1e-10
FUSED = 1e-12

CONFIGS = {
    "Bert": transformers.BertConfig,
    "Roberta": transformers.RobertaConfig,
    "DebertaV2": transformers.DebertaV2Config,
}
HEADS = ("ForTokenClassification", "ForMaskedLM", "ForSequenceClassification")

values = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.001, 1.0))


@st.composite
def models(draw: st.DrawFn) -> transformers.PreTrainedModel:
    """Random models of random small sizes, odd ones included."""
    family = draw(st.sampled_from(sorted(CONFIGS)))
    heads, head_dim = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    sizes: dict[str, Any] = {
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        # Two dimensions at least: a norm over a single one returns its bias whatever it is given.
        "hidden_size": max(heads * head_dim, 2 * heads),
        "intermediate_size": draw(st.integers(1, 9)),
        "vocab_size": 12,
        "max_position_embeddings": 16,
    }
    if family == "DebertaV2":
        sizes["relative_attention"] = draw(st.booleans())
        sizes["pos_att_type"] = draw(st.sampled_from(["c2p", "p2c", "c2p|p2c"]))
        sizes["share_att_key"] = draw(st.booleans())
        sizes["norm_rel_ebd"] = draw(st.sampled_from(["none", "layer_norm"]))
        sizes["conv_kernel_size"] = draw(st.sampled_from([0, 1, 3]))
    cls = getattr(transformers, family + draw(st.sampled_from(HEADS)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 100)))
    return specimens.specimen(cls(CONFIGS[family](**sizes)), generator)


def masks_for(draw: st.DrawFn, structure: Structure, choice: tuple[str, ...]) -> dict[str, Tensor]:
    """Any masks at all, as long as two hidden dimensions stay."""
    found = {}
    for group in structure.select(choice):
        row = draw(st.lists(values, min_size=group.size, max_size=group.size))
        if group.name == "hidden":
            row[0] = row[0] or 1.0
            row[-1] = row[-1] or 0.5
        found[group.name] = torch.tensor(row, dtype=torch.float64)
    return found


@LAW
@given(st.data(), models(), st.sampled_from(specimens.unit_choices()))
def test_masked_bound_and_compacted_models_agree(
    data: st.DataObject, model: transformers.PreTrainedModel, choice: tuple[str, ...]
) -> None:
    batch = specimens.inputs(model, torch.Generator().manual_seed(0))
    structure = cofiprune.structure(model)
    rows = masks_for(data.draw, structure, choice)
    with cofiprune.attach(model, choice) as masks:
        masks.update(rows)
        (masked,) = specimens.outputs(model, batch).values()
        small = cofiprune.compact(model)
        sparsity = masks.sparsity()
        masks.bind(rows)
        (bound,) = specimens.outputs(model, batch).values()
    (cut,) = specimens.outputs(small, batch).values()
    scale = max(1.0, masked.abs().max().item())
    assert (masked - cut).abs().max().item() <= EXACT * scale
    assert (masked - bound).abs().max().item() <= EXACT * scale
    layers = tuple(structure.layers)
    before, after = (
        sum(value.numel() for name, value in each.named_parameters() if name.startswith(layers))
        for each in (model, small)
    )
    assert sparsity == 1 - after / before


@LAW
@given(st.data(), models())
def test_compacting_in_two_steps_is_compacting_in_one(data: st.DataObject, model: transformers.PreTrainedModel) -> None:
    batch = specimens.inputs(model, torch.Generator().manual_seed(0))
    structure = cofiprune.structure(model)
    every = ("layer", "head", "intermediate", "hidden")
    first, second = (masks_for(data.draw, structure, every) for _ in range(2))
    with cofiprune.attach(model) as masks:
        masks.update({name: first[name] * second[name] for name in first})
        at_once = masks.plan()
    with cofiprune.attach(model) as masks:
        masks.update(first)
        half = cofiprune.compact(model)
        kept = masks.plan().keep
    with cofiprune.attach(half) as masks:
        masks.update({name: second[name][list(kept[name])] for name in masks})
        twice = cofiprune.compact(half)
    (one,) = specimens.outputs(cofiprune.compact(model, at_once), batch).values()
    (two,) = specimens.outputs(twice, batch).values()
    assert (one - two).abs().max().item() <= EXACT * max(1.0, one.abs().max().item())


@LAW
@given(st.data(), models())
def test_fused_and_compacted_models_agree(data: st.DataObject, model: transformers.PreTrainedModel) -> None:
    batch = specimens.inputs(model, torch.Generator().manual_seed(0))
    rows = masks_for(data.draw, cofiprune.structure(model), ("layer", "head", "intermediate", "hidden"))
    with cofiprune.attach(model) as masks:
        masks.update(rows)
        separate, fused = cofiprune.compact(model), cofiprune.compact(model, fuse=True)
    (one,) = specimens.outputs(separate, batch).values()
    (two,) = specimens.outputs(fused, batch).values()
    assert (one - two).abs().max().item() <= FUSED * max(1.0, one.abs().max().item())
    assert all(torch.equal(value, fused.state_dict()[name]) for name, value in separate.state_dict().items())

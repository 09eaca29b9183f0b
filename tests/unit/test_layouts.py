"""Where families differ from BERT: shared layers and biases, norms that are not there, decoders, pre-norm blocks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel, T5EncoderModel

import cofiprune
from cofiprune import accounting
from cofiprune.conformance.specimens import inputs, outputs, specimen, tiny_config
from cofiprune.errors import AdapterError


def model_of(model_type: str, cls: str, **settings: Any) -> PreTrainedModel:
    """A small model of a family."""
    config = tiny_config(model_type)
    entries = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    model: PreTrainedModel = getattr(transformers, cls)(type(config)(**{**entries, **settings}))
    return model.eval()


def test_layers_that_share_their_weights_are_cut_and_counted_once() -> None:
    model = model_of("albert", "AlbertModel", num_hidden_layers=5, num_hidden_groups=2, inner_group_num=2)
    structure = cofiprune.structure(model)
    groups = "encoder.albert_layer_groups"
    assert structure.layers == tuple(f"{groups}.{group}.albert_layers.{i}" for group in (0, 1) for i in (0, 1))
    own = sum(value.numel() for name, value in model.named_parameters() if name.startswith(groups))
    assert accounting.layer_parameters(structure).exact(structure.sizes) == own
    query = {spec.name: spec for spec in structure.parameters}
    # Of 5 layers, the first group is applied 3 times and the second twice.
    assert query[f"{groups}.0.albert_layers.1.attention.query.weight"].applications == (3, 0)
    assert query[f"{groups}.1.albert_layers.0.attention.query.weight"].applications == (2, 0)
    assert [block.pairwise for block in structure.blocks if block.gate.endswith("attention")] == [36, 36, 24, 24]


def test_a_norm_that_a_layer_does_without_is_none() -> None:
    structure = cofiprune.structure(model_of("modernbert", "ModernBertModel"))
    found = [norm.module for norm in structure.norms]
    assert "layers.0.attn_norm" not in found
    assert "layers.1.attn_norm" in found


@pytest.mark.parametrize("cls", ["T5Model", "T5ForSequenceClassification", "T5ForQuestionAnswering"])
def test_a_model_with_a_decoder_is_refused(cls: str) -> None:
    with pytest.raises(AdapterError, match=rf"{cls} is an encoder with a decoder.*encoder alone"):
        cofiprune.attach(model_of("t5", cls))


def test_differentiable_masks_without_units_leave_no_bias() -> None:
    model = model_of("modernbert", "ModernBertModel", attention_bias=True, mlp_bias=True)
    batch = inputs(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("Wo.bias"):
                parameter.fill_(1)
    with cofiprune.attach(model) as masks:
        for name in masks:
            if name.endswith(("heads", "intermediate")):
                masks[name] = torch.zeros_like(masks[name])
        expected = outputs(model, batch)["last_hidden_state"]
        masks.bind({name: value.clone() for name, value in masks.items()})
        found = outputs(model, batch)["last_hidden_state"]
    assert torch.allclose(found, expected, atol=1e-5)


def states(model: PreTrainedModel) -> torch.Tensor:
    return outputs(model, inputs(model, torch.Generator().manual_seed(0)))["last_hidden_state"]


def test_a_table_in_the_first_layer_serves_the_others_without_its_block(tmp_path: Path) -> None:
    """Against the stock model with zeros in its last projections, which no mask and no slice has touched."""
    model = specimen(model_of("t5", "T5EncoderModel", num_layers=3), torch.Generator().manual_seed(0))
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        zeroed.encoder.block[0].layer[0].SelfAttention.o.weight.zero_()
        zeroed.encoder.block[1].layer[0].SelfAttention.o.weight[:, 6:12] = 0
        zeroed.encoder.block[2].layer[0].SelfAttention.o.weight[:, :6] = 0
    expected = states(zeroed)
    with cofiprune.attach(model, ("layer", "head")) as masks:
        masks["layers.0.attention"] = [0]
        masks["layers.1.heads"] = [1, 0, 1, 1]
        assert not torch.allclose(states(model), expected, atol=1e-3)
        masks["layers.2.heads"] = [0, 1, 1, 1]
        assert torch.allclose(states(model), expected, atol=1e-6)
        small = cofiprune.compact(model)
    for _ in range(2):
        assert torch.allclose(states(small), expected, atol=1e-6)
        first = small.encoder.block[0].layer[0].SelfAttention
        assert [name for name, _ in first.named_parameters()] == ["relative_attention_bias.weight"]
        assert first.relative_attention_bias.weight.shape == (32, 4)
        small.save_pretrained(tmp_path)
        small = T5EncoderModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    with cofiprune.attach(small) as masks:
        masks["layers.1.heads"] = [1, 1, 0]
        expected = states(small)
        smaller = cofiprune.compact(small)
    assert torch.allclose(states(smaller), expected, atol=1e-6)

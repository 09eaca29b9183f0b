"""Layers that hold more than two blocks, and weights that are read from outside the module that holds them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import cofiprune
from cofiprune.adapter import Adapter, ExtraTable, Family
from cofiprune.conformance.specimens import inputs, outputs, specimen, tiny_config
from cofiprune.errors import LawError
from cofiprune_adapters.conformer import adapter as conformer
from cofiprune_adapters.wavlm import adapter as wavlm

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")


class Altered(Adapter):
    """An adapter with another value for one field of its family."""

    def __init__(self, true: Adapter, **fields: Any) -> None:
        self.true = true
        self.fields = fields
        self.model_types = true.model_types

    def describe(self, config: transformers.PretrainedConfig) -> Family:
        return replace(self.true.describe(config), **self.fields)


def model_of(model_type: str, cls: str, **settings: Any) -> PreTrainedModel:
    return getattr(transformers, cls)(tiny_config(model_type, **settings))


def test_the_rest_of_a_layer_stays_and_is_counted() -> None:
    model = model_of("wav2vec2-bert", "Wav2Vec2BertModel")
    structure = cofiprune.structure(model)
    assert [exit.module for exit in structure.extra[:2]] == [
        "encoder.layers.0.conv_module",
        "encoder.layers.0.final_layer_norm",
    ]
    with cofiprune.attach(model, "layer") as masks:
        for name in masks:
            masks[name] = [0]
        small = cofiprune.compact(model)
        sparsity = masks.sparsity()
    left = sum(value.numel() for value in small.encoder.layers.parameters())
    kept = sum(
        value.numel() for name, value in model.named_parameters() if "conv_module" in name or "final_layer_norm" in name
    )
    assert left == kept
    assert sparsity == 1 - left / sum(value.numel() for value in model.encoder.layers.parameters())


def test_both_feed_forwards_of_a_conformer_are_one_block() -> None:
    """Against the stock model with zeros in the last projections, which no mask and no slice has touched."""
    model = specimen(model_of("wav2vec2-bert", "Wav2Vec2BertModel"), torch.Generator().manual_seed(0))
    batch = inputs(model, torch.Generator().manual_seed(0))
    zeroed = specimen(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for half in (zeroed.encoder.layers[0].ffn1, zeroed.encoder.layers[0].ffn2):
            half.output_dense.weight[:, 5] = 0
        for half in (zeroed.encoder.layers[1].ffn1, zeroed.encoder.layers[1].ffn2):
            half.output_dense.weight.zero_()
            half.output_dense.bias.zero_()
    expected = outputs(zeroed, batch)["last_hidden_state"]
    with cofiprune.attach(model) as masks:
        masks["layers.0.intermediate"] = torch.arange(34) != 5
        masks["layers.1.ffn"] = [0]
        small = cofiprune.compact(model)
    assert small.encoder.layers[0].ffn1.output_dense.weight.shape == (24, 33)
    assert torch.allclose(outputs(small, batch)["last_hidden_state"], expected, atol=1e-10)


def test_rotary_positions_of_a_conformer() -> None:
    report = cofiprune.check_adapter(
        model_of("wav2vec2-conformer", "Wav2Vec2ConformerModel", position_embeddings_type="rotary"), units="head"
    )
    assert report.largest_difference <= 1e-10
    assert "head by head" in next(iter(report.refused.values()))


def test_a_rest_that_is_not_named_is_found() -> None:
    model = model_of("wav2vec2-bert", "Wav2Vec2BertModel")
    lie = Altered(conformer, extra=ExtraTable(rows=conformer.describe(model.config).extra.rows))
    with pytest.raises(LawError, match="does not return its input.*belongs into the family's extra"):
        cofiprune.check_adapter(lie, heads="Model", configs=[model.config])


def test_a_projection_that_is_not_called_needs_its_reader() -> None:
    model = model_of("wavlm", "WavLMModel", do_stable_layer_norm=True)
    table = wavlm.describe(model.config).attention
    lie = Altered(wavlm, attention=replace(table, rows=tuple(replace(row, read_in=None) for row in table.rows)))
    with pytest.raises(LawError, match="attention"):
        cofiprune.check_adapter(lie, heads="Model", configs=[model.config])


def test_wavlm_hands_its_positions_on_without_its_first_block() -> None:
    """Against the stock model whose first attention writes nothing."""
    model = specimen(model_of("wavlm", "WavLMModel", do_stable_layer_norm=True), torch.Generator().manual_seed(0))
    batch = inputs(model, torch.Generator().manual_seed(0))
    zeroed = specimen(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        zeroed.encoder.layers[0].attention.out_proj.weight.zero_()
        zeroed.encoder.layers[0].attention.out_proj.bias.zero_()
    expected = outputs(zeroed, batch)["last_hidden_state"]
    with cofiprune.attach(model) as masks:
        masks["layers.0.attention"] = [0]
        assert torch.allclose(outputs(model, batch)["last_hidden_state"], expected, atol=1e-10)
        small = cofiprune.compact(model)
    assert [name for name, _ in small.encoder.layers[0].attention.named_parameters()] == ["rel_attn_embed.weight"]
    assert torch.allclose(outputs(small, batch)["last_hidden_state"], expected, atol=1e-10)

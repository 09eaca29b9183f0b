"""The law for every family, head class and choice of unit kinds: a masked model is its compacted self.

In float64, with biases and norms that are not trivial, inputs of different lengths, and random hard and fractional
masks; without them a model that is sliced at the wrong places passes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import cofiprune
from cofiprune.conformance import specimens
from cofiprune.errors import StructureError

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 34,
    "vocab_size": 40,
    "max_position_embeddings": 32,
}
RELATIVE = {"relative_attention": True, "pos_att_type": "c2p|p2c", "position_biased_input": False}

ALL = None
SOME = ("Model", "ForMaskedLM", "ForSequenceClassification")

# Name of the case: configuration class, settings, endings of the head classes (None for all).
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any], tuple[str, ...] | None]] = {
    "bert": ("BertConfig", {}, ALL),
    "bert-eager-untied": (
        "BertConfig",
        {"attn_implementation": "eager", "tie_word_embeddings": False},
        ("ForMaskedLM",),
    ),
    "roberta": ("RobertaConfig", {}, ALL),
    "xlm-roberta": ("XLMRobertaConfig", {}, ALL),
    "camembert": ("CamembertConfig", {}, ALL),
    "deberta": ("DebertaConfig", RELATIVE, ALL),
    "deberta-absolute": ("DebertaConfig", {"type_vocab_size": 2}, SOME),
    "deberta-narrow": (
        "DebertaConfig",
        {"relative_attention": True, "pos_att_type": ["p2c"], "embedding_size": 10},
        SOME,
    ),
    "deberta-enhanced": (
        "DebertaConfig",
        {**RELATIVE, "legacy": False, "max_relative_positions": 4},
        ("ForMaskedLM",),
    ),
    "deberta-talking": ("DebertaConfig", {**RELATIVE, "talking_head": True}, ("ForTokenClassification",)),
    # As microsoft/deberta-v3-base.
    "deberta-v3": (
        "DebertaV2Config",
        {**RELATIVE, "position_buckets": 4, "norm_rel_ebd": "layer_norm", "share_att_key": True, "legacy": False},
        ALL,
    ),
    # As microsoft/deberta-v2-xlarge.
    "deberta-v2-conv": (
        "DebertaV2Config",
        {
            **RELATIVE,
            "position_buckets": 4,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "conv_kernel_size": 3,
            "conv_act": "gelu",
            "attention_head_size": 6,
        },
        SOME,
    ),
    "deberta-v2-separate": ("DebertaV2Config", {**RELATIVE, "type_vocab_size": 2}, SOME),
    "deberta-v2-narrow": (
        "DebertaV2Config",
        {"relative_attention": True, "pos_att_type": "c2p", "embedding_size": 10, "position_biased_input": True},
        SOME,
    ),
    "deberta-v2-grouped": (
        "DebertaV2Config",
        {**RELATIVE, "conv_kernel_size": 3, "conv_groups": 2},
        ("ForTokenClassification",),
    ),
}

EXACT = 1e-10
# The norms of DeBERTa (v1) compute in float32 in a float64 model too. Both models round alike nearly always, and the
# difference is 1e-15 as elsewhere; but where two numbers lie on either side of a rounding boundary it is 1e-7.
ROUNDED = 1e-5


@functools.cache
def specimen(family: str, head: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A random model and its inputs."""
    name, settings, _ = FAMILIES[family]
    generator = torch.Generator().manual_seed(0)
    cls = getattr(transformers, head)
    model = specimens.specimen(cls(getattr(transformers, name)(**SIZES, **settings)), generator)
    return model, specimens.inputs(model, generator)


def models() -> Iterator[Any]:
    """Every family with every of its head classes."""
    for family, (name, settings, endings) in FAMILIES.items():
        for cls in specimens.head_classes(getattr(transformers, name)(**SIZES, **settings)):
            if endings is None or cls.__name__.endswith(endings):
                yield pytest.param(family, cls.__name__, id=f"{family}-{cls.__name__}")


def difference(masked: Mapping[str, Tensor], cut: Mapping[str, Tensor], hidden: tuple[int, ...]) -> float:
    """Largest difference of two models' outputs, on the kept dimensions where the encoder's states come out."""
    assert masked.keys() == cut.keys()
    gaps = []
    for name, value in masked.items():
        if value.shape != cut[name].shape:
            assert name == "last_hidden_state"
            value = value[..., list(hidden)]
        gaps.append((value - cut[name]).abs().max().item())
    return max(gaps)


@pytest.mark.parametrize("choice", specimens.unit_choices(), ids="+".join)
@pytest.mark.parametrize(("family", "head"), list(models()))
def test_masked_model_is_its_compacted_self(family: str, head: str, choice: tuple[str, ...]) -> None:
    model, batch = specimen(family, head)
    structure = cofiprune.structure(model)
    if refused := structure.refused.keys() & set(choice):
        with pytest.raises(StructureError, match=structure.refused[min(refused)][:20]):
            cofiprune.attach(model, choice)
        return
    generator = torch.Generator().manual_seed(len(choice))
    stock = specimens.outputs(model, batch)
    for fractional in (False, True):
        with cofiprune.attach(model, choice) as masks:
            for name in masks:
                masks[name] = specimens.random_values(len(masks[name]), generator, fractional=fractional)
            masked = specimens.outputs(model, batch)
            small = cofiprune.compact(model)
            sparsity, plan = masks.sparsity(), masks.plan()
        found = difference(masked, specimens.outputs(small, batch), plan.keep.get("hidden", ()))
        assert found <= (ROUNDED if structure.family == "deberta" else EXACT)
        layers = tuple(structure.layers)
        before, after = (
            sum(value.numel() for name, value in each.named_parameters() if name.startswith(layers))
            for each in (model, small)
        )
        assert sparsity == 1 - after / before
    again = specimens.outputs(model, batch)
    assert all(torch.equal(again[name], value) for name, value in stock.items())


def test_rounding_of_deberta_is_rare() -> None:
    """The allowance for DeBERTa is for rounding only: a fault would show in every case."""
    model, batch = specimen("deberta", "DebertaForTokenClassification")
    exact = 0
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        with cofiprune.attach(model) as masks:
            for name in masks:
                masks[name] = specimens.random_values(len(masks[name]), generator, fractional=True)
            masked = specimens.outputs(model, batch)
            small = cofiprune.compact(model)
        exact += difference(masked, specimens.outputs(small, batch), ()) <= EXACT
    assert exact >= 7


def test_refused_units_are_left_out() -> None:
    talking, _ = specimen("deberta-talking", "DebertaForTokenClassification")
    assert [name for name in cofiprune.structure(talking) if "0" in name] == [
        "layers.0.attention",
        "layers.0.ffn",
        "layers.0.intermediate",
    ]
    grouped, _ = specimen("deberta-v2-grouped", "DebertaV2ForTokenClassification")
    assert "hidden" not in cofiprune.structure(grouped)
    with pytest.raises(StructureError, match="talking_head mixes"):
        cofiprune.structure(talking)["layers.0.heads"]


def test_a_head_that_no_row_describes_refuses_the_hidden_size() -> None:
    model = transformers.BertLMHeadModel(transformers.BertConfig(**SIZES)).eval()
    structure = cofiprune.structure(model)
    assert "hidden" not in structure
    assert "BertLMHeadModel" in structure.refused["hidden"]

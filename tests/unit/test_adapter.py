"""What an adapter says wrongly is caught, and the parameter or module at fault is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import transformers
from transformers import PretrainedConfig, PreTrainedModel

import cofiprune
from cofiprune.adapter import (
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    Adapter,
    Family,
    Weights,
    adapter_for,
    embedding,
    known_families,
    linear,
    norm,
    projection,
)
from cofiprune.conformance import check_adapter
from cofiprune.errors import AdapterError, CofipruneError, LawError
from cofiprune.structure import BlockExit
from cofiprune_adapters.bert import adapter as bert
from cofiprune_adapters.deberta import adapter as deberta
from cofiprune_adapters.deberta_v2 import adapter as deberta_v2

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 34,
    "vocab_size": 40,
    "max_position_embeddings": 32,
}
RELATIVE = {"relative_attention": True, "pos_att_type": "c2p|p2c"}
CONFIGS = {
    "bert": transformers.BertConfig(**SIZES),
    "deberta": transformers.DebertaConfig(**SIZES, **RELATIVE),
    "deberta-v2": transformers.DebertaV2Config(**SIZES, **RELATIVE),
}

Change = Callable[[Family], Family]
Build = Callable[..., PreTrainedModel]
Register = Callable[[Adapter], None]


class Altered(Adapter):
    """An adapter that tells the truth but for one thing."""

    def __init__(self, true: Adapter, change: Change) -> None:
        self.true = true
        self.change = change
        self.model_types = true.model_types

    def describe(self, config: PretrainedConfig) -> Family:
        return self.change(self.true.describe(config))


def swapped(rows: tuple[Weights, ...], modules: str, *new: Weights) -> tuple[Weights, ...]:
    assert modules in [row.modules for row in rows]
    return tuple(row for old in rows for row in (new if old.modules == modules else (old,)))


def attention(modules: str, *new: Weights) -> Change:
    """Other rows for some modules of the attention block."""
    return lambda family: replace(
        family, attention=replace(family.attention, rows=swapped(family.attention.rows, modules, *new))
    )


def ffn(modules: str, *new: Weights) -> Change:
    return lambda family: replace(family, ffn=replace(family.ffn, rows=swapped(family.ffn.rows, modules, *new)))


def stem(modules: str, *new: Weights) -> Change:
    return lambda family: replace(family, stem=swapped(family.stem, modules, *new))


def block(name: str, **settings: Any) -> Change:
    return lambda family: replace(family, **{name: replace(getattr(family, name), **settings)})


QKV = "attention.self.{query,key,value}"
KEY_VALUE = linear("attention.self.{key,value}", reads=HIDDEN, writes=HEADS)
SELF = "encoder.layer.0.attention.self"

# The adapter, what is changed in it, the head class, and what the error must name.
LIES: dict[str, tuple[Adapter, Change, str]] = {
    "a block size that does not fit": (
        bert,
        attention(QKV, linear(QKV, reads=HIDDEN, writes=HEADS.of(7))),
        f"parameter 'bert.{SELF}.query.weight' has length 24 along 'heads'",
    ),
    "copies that fit but are not there, in one of three": (
        bert,
        attention(QKV, KEY_VALUE, linear("attention.self.query", reads=HIDDEN, writes=HEADS.times(2))),
        f"at fault is 'bert.{SELF}.query.weight'",
    ),
    "copies that fit but are not there, in the projection": (
        bert,
        attention("attention.output.dense", projection("attention.output.dense", reads=HEADS.times(2))),
        "at fault is 'bert.encoder.layer.0.attention.output.dense.weight'",
    ),
    "three projections after one another, not head by head": (
        deberta,
        attention("attention.self.in_proj", linear("attention.self.in_proj", reads=HIDDEN, writes=HEADS.times(3))),
        f"at fault is 'deberta.{SELF}.in_proj.weight'",
    ),
    "a forgotten bias": (
        bert,
        attention(QKV, KEY_VALUE, Weights("attention.self.query", {"weight": (HEADS, HIDDEN)})),
        f"'bert.{SELF}.query.bias'",
    ),
    "a forgotten bias outside the layers": (
        bert,
        lambda family: replace(family, heads={**family.heads, "ForMaskedLM": masked_lm_without_bias(family)}),
        "'cls.predictions.transform.dense.bias'",
    ),
    "a forgotten matrix": (
        bert,
        attention(QKV, linear("attention.self.{query,key}", reads=HIDDEN, writes=HEADS)),
        f"'bert.{SELF}.value.weight'",
    ),
    "a forgotten reader": (bert, stem("pooler.dense"), "'bert.pooler.dense.weight'"),
    "a forgotten table": (
        bert,
        stem("embeddings.{word,position,token_type}_embeddings", embedding("embeddings.{word,position}_embeddings")),
        "'bert.embeddings.token_type_embeddings.weight'",
    ),
    "swapped axes": (
        bert,
        attention(QKV, KEY_VALUE, linear("attention.self.query", reads=HEADS, writes=HIDDEN)),
        f"'bert.{SELF}.query.weight'",
    ),
    "another group": (
        bert,
        attention(QKV, KEY_VALUE, linear("attention.self.query", reads=HIDDEN, writes=HIDDEN)),
        f"'bert.{SELF}.query.weight'",
    ),
    "a forgotten norm in a block": (
        bert,
        attention("attention.output.LayerNorm"),
        "'bert.encoder.layer.0.attention.output.LayerNorm.weight'",
    ),
    "a norm described as weights": (
        bert,
        stem(
            "embeddings.LayerNorm",
            Weights("embeddings.LayerNorm", {"weight": (HIDDEN.scaled,), "bias": (HIDDEN.scaled,)}),
        ),
        "'bert.embeddings.LayerNorm' with",
    ),
    "a norm described as weights that are not scaled": (
        bert,
        stem("embeddings.LayerNorm", Weights("embeddings.LayerNorm", {"weight": (HIDDEN,), "bias": (HIDDEN,)})),
        "at fault is 'bert.embeddings.LayerNorm.weight'",
    ),
    "a forgotten size attribute": (
        deberta,
        block("attention", attributes=()),
        rf"'deberta.{SELF}'.*num_attention_heads = 4",
    ),
    "a forgotten size attribute of deberta-v2": (
        deberta_v2,
        block("attention", attributes=()),
        rf"'deberta.{SELF}'.*num_attention_heads = 4",
    ),
    "the wrong argument for an exit": (
        bert,
        block("ffn", exit=BlockExit("output", argument=0)),
        r"'layers.0.ffn' through BlockExit\(module='bert.encoder.layer.0.output', argument=0",
    ),
    "the attention mask for an exit": (
        deberta,
        block("attention", exit=BlockExit("attention", argument=1, outputs=2)),
        r"'layers.0.attention' through BlockExit\(module='deberta.encoder.layer.0.attention', argument=1",
    ),
    "the wrong number of outputs": (
        bert,
        block("attention", exit=BlockExit("attention", keyword="hidden_states", outputs=1)),
        "'layers.0.attention' through BlockExit",
    ),
    "a residual that is not added": (
        bert,
        block("attention", exit=BlockExit("attention", outputs=2, residual=False)),
        r"'layers.0.attention' leaves through BlockExit\(.*the residual is added",
    ),
    "an exit inside the block": (
        bert,
        block("attention", exit=BlockExit("attention.output", argument=1)),
        f"'bert.{SELF}.query.weight' belongs to 'layers.0.attention' but lies outside",
    ),
    "a module that is not skipped": (
        bert,
        block("ffn", bypassed=()),
        "'bert.encoder.layer.0.intermediate.dense.weight' belongs to 'layers.0.ffn' but lies outside",
    ),
    "a bias that no gate scales": (
        bert,
        ffn(
            "output.dense",
            Weights("output.dense", {"weight": (HIDDEN.scaled, INTERMEDIATE.scaled)}, gated=True, rows=(1, 0)),
            Weights("output.dense", {"bias": (HIDDEN.scaled,)}),
        ),
        "'bert.encoder.layer.0.output.dense.bias' is not scaled by 'layers.0.ffn'",
    ),
    "no projection": (
        bert,
        ffn("output.dense", linear("output.dense", reads=INTERMEDIATE, writes=HIDDEN)),
        r"no projection\(...\) row of 'layers.0.ffn' reads 'intermediate'",
    ),
    "removed positions that are read": (
        deberta,
        attention(
            "attention.self.{pos_proj,pos_q_proj}",
            linear("attention.self.{pos_proj,pos_q_proj}", reads=HIDDEN, writes=HEADS),
        ),
        f"at fault is 'deberta.{SELF}.pos_proj.weight'",
    ),
    "a table that is read directly and scaled": (
        deberta,
        stem("encoder.rel_embeddings", embedding("encoder.rel_embeddings")),
        "at fault is 'deberta.encoder.rel_embeddings'",
    ),
    "a norm before a tied decoder": (
        deberta,
        lambda family: replace(
            family,
            heads={
                **family.heads,
                "ForMaskedLM": tuple(replace(row, read_by=None) for row in family.heads["ForMaskedLM"]),
            },
        ),
        "at fault is 'cls.predictions.transform.LayerNorm'",
    ),
    "a module that is not there": (
        bert,
        stem("pooler.dense", linear("poler.dense", reads=HIDDEN)),
        "names the module 'bert.poler.dense'.*Did you mean 'bert.pooler.dense'",
    ),
    "units that cannot be refused": (
        bert,
        lambda family: replace(family, refused={"layer": "no"}),
        "refused names",
    ),
}


def masked_lm_without_bias(family: Family) -> tuple[Weights, ...]:
    return swapped(
        family.heads["ForMaskedLM"],
        "cls.predictions.transform.dense",
        Weights("cls.predictions.transform.dense", {"weight": (HIDDEN, HIDDEN)}, rows=(1, 0)),
    )


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_caught_and_named(lie: str) -> None:
    true, change, named = LIES[lie]
    head = "ForMaskedLM" if "predictions" in named else "ForSequenceClassification"
    config = CONFIGS[true.model_types[0]]
    with pytest.raises((LawError, AdapterError), match=re.compile(named, re.DOTALL)):
        check_adapter(Altered(true, change), heads=head, configs=[config])
    assert adapter_for(transformers.BertModel(CONFIGS["bert"])) is bert


def test_the_truth_passes_where_the_lies_do_not() -> None:
    for true in (bert, deberta, deberta_v2):
        config = CONFIGS[true.model_types[0]]
        check_adapter(Altered(true, lambda family: family), heads="ForMaskedLM", configs=[config])


def test_a_registered_adapter_takes_precedence(build: Build, register: Register) -> None:
    model = build("BertModel")
    mine = Altered(bert, lambda family: replace(family, refused={"hidden": "mine"}))
    assert "hidden" in cofiprune.structure(model)
    register(mine)
    assert adapter_for(model) is mine
    assert "hidden" not in cofiprune.structure(model)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (Altered, "pass an instance"),
        ("bert", "takes an instance"),
        (Adapter(), "must be a tuple"),
    ],
)
def test_what_is_no_adapter_is_not_registered(adapter: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        cofiprune.register_adapter(adapter)


def test_an_adapter_without_a_table_says_so(build: Build) -> None:
    class Empty(Adapter):
        model_types = ("bert",)

    with pytest.raises(AdapterError, match=r"Empty has no describe\(config\)"):
        Empty().structure(build("BertModel"))


def test_our_own_families_are_known() -> None:
    assert {"bert", "roberta", "xlm-roberta", "camembert", "deberta", "deberta-v2"} <= set(known_families())


def test_a_layer_list_elsewhere_is_an_error(build: Build) -> None:
    moved = Altered(bert, lambda family: replace(family, layers="encoder.layers"))
    with pytest.raises(CofipruneError, match=r"no list of layers at 'encoder.layers'"):
        moved.structure(build("BertModel"))


def test_rows_of_norms_are_norms(build: Build) -> None:
    structure = cofiprune.structure(build("BertModel"))
    assert len(structure.norms) == 5
    assert norm("a.b", kind="rms").norm == "rms"

"""One thing that an adapter says wrongly, of each kind: `check_adapter` names the parameter and what to correct.

Each lie is told about the toy encoder of the examples where that has what is lied
about, and else about a family of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import pytest
from transformers import PretrainedConfig

from cofiprune import Adapter, check_adapter
from cofiprune.adapter import (
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    ConfigSizes,
    Family,
    Weights,
    embedding,
    linear,
    norm,
    projection,
)
from cofiprune.conformance.specimens import tiny_config
from cofiprune.errors import AdapterError, LawError
from cofiprune.structure import BlockExit
from cofiprune_adapters.albert import adapter as albert
from cofiprune_adapters.bert import adapter as bert
from cofiprune_adapters.deberta import adapter as deberta
from cofiprune_adapters.mpnet import adapter as mpnet
from cofiprune_adapters.t5 import adapter as t5

Change = Callable[[Family], Family]


class Liar(Adapter):
    """An adapter that tells the truth but for one thing."""

    def __init__(self, true: Adapter, change: Change) -> None:
        self.true = true
        self.change = change
        self.model_types = true.model_types[:1]
        self.test_settings = true.test_settings

    def describe(self, config: PretrainedConfig) -> Family:
        return self.change(self.true.describe(config))


def exchanged(rows: tuple[Weights, ...], modules: str, *new: Weights) -> tuple[Weights, ...]:
    assert modules in [row.modules for row in rows]
    return tuple(row for old in rows for row in (new if old.modules == modules else (old,)))


def block(name: str, modules: str | None = None, *new: Weights, **settings: Any) -> Change:
    """Other rows for some modules of a block, or other settings of its table."""

    def change(family: Family) -> Family:
        table = getattr(family, name)
        rows = table.rows if modules is None else exchanged(table.rows, modules, *new)
        return replace(family, **{name: replace(table, rows=rows, **settings)})

    return change


def added(name: str, row: Weights) -> Change:
    def change(family: Family) -> Family:
        table = getattr(family, name)
        return replace(family, **{name: replace(table, rows=(*table.rows, row))})

    return change


def stem(modules: str, *new: Weights) -> Change:
    return lambda family: replace(family, stem=exchanged(family.stem, modules, *new))


def head(name: str, *rows: Weights) -> Change:
    return lambda family: replace(family, heads={**family.heads, name: rows})


def head_row(modules: str, *new: Weights) -> Change:
    """Other rows for some modules of the masked language modelling head."""
    return lambda family: head(MASKED, *exchanged(family.heads[MASKED], modules, *new))(family)


def shared(**settings: Any) -> Change:
    """Other settings of what the attention block gets for all heads."""
    return lambda family: block("attention", shared=(replace(family.attention.shared[0], **settings),))(family)


def each(*changes: Change) -> Change:
    def change(family: Family) -> Family:
        for part in changes:
            family = part(family)
        return family

    return change


def unscaled(path: str, weight: Any, bias: Any) -> Weights:
    return Weights(path, {"weight": weight, "bias": bias}, gated=True, rows=(1, 0))


CLASSIFIER, TAGS, MASKED = "ForSequenceClassification", "ForTokenClassification", "ForMaskedLM"
TRANSFORM = "cls.predictions.transform.dense"
KEY_VALUE = linear("attention.self.{key,value}", reads=HIDDEN, writes=HEADS)
IN_PROJ, OUT_PROJ = "attention.in_proj", "attention.out_proj"
LAYER = "toy.layers.0"
QKV = "attention.self.{query,key,value}"
SELF = "bert.encoder.layer.0.attention.self"
BIAS = "mpnet.encoder.layer.0.attention.attn"

RELATIVE = {"relative_attention": True, "pos_att_type": "c2p|p2c"}


class Lie(NamedTuple):
    """What an adapter says wrongly, and how the error names it."""

    change: Change
    units: str | None
    """The units under which it shows; None for all."""
    named: str
    """A pattern of what the error must say."""
    of: Adapter | None = None
    """The adapter that is changed; None for the toy's."""
    head: str = CLASSIFIER
    settings: Mapping[str, Any] = MappingProxyType({})


LIES: dict[str, Lie] = {
    "axes of a square projection swapped": Lie(
        block("attention", OUT_PROJ, unscaled(OUT_PROJ, (HEADS.scaled, HIDDEN.scaled), (HIDDEN.scaled,))), "head",
        rf"'{LAYER}.attention.out_proj.weight' \(dimension 0, 24 long: layers.0.heads.*needs its axis, and no other"),
    "axes of an oblong projection swapped": Lie(
        block("ffn", "mlp.0", linear("mlp.0", reads=INTERMEDIATE, writes=HIDDEN)), "intermediate",
        f"parameter '{LAYER}.mlp.0.weight' has length 34 along 'hidden'"),
    "queries, keys and values after one another, described head by head": Lie(
        block("attention", IN_PROJ, linear(IN_PROJ, reads=HIDDEN, writes=HEADS)), "head",
        f"at fault is '{LAYER}.attention.in_proj.weight'.*block 18, slice.*copies, block, role"),
    "too few copies": Lie(
        block("attention", IN_PROJ, linear(IN_PROJ, reads=HIDDEN, writes=HEADS.times(2))), "head",
        f"at fault is '{LAYER}.attention.in_proj.weight'.*copies 2 x units 4 x block 9"),
    "heads strided in one row for three projections": Lie(
        block("attention", QKV, linear(QKV, reads=HIDDEN, writes=HEADS.times(6))), "head",
        f"at fault is '{SELF}.query.weight'.*copies 6 x units 4 x block 1", of=bert),
    "heads strided in all of attention": Lie(
        each(
            block("attention", IN_PROJ, linear(IN_PROJ, reads=HIDDEN, writes=HEADS.times(18))),
            block("attention", OUT_PROJ, projection(OUT_PROJ, reads=HEADS.times(6)))),
        "head", f"at fault is '{LAYER}.attention.in_proj.weight'.*copies 18 x units 4 x block 1"),
    "an exit at the projection, before the residual norm": Lie(
        block("ffn", exit=BlockExit("output.dense")), "layer",
        "'bert.encoder.layer.0.output.LayerNorm.weight' belongs to 'layers.0.ffn' but lies outside.*move the exit up",
        of=bert),
    "an exit at the other block": Lie(
        block("ffn", exit=BlockExit("attention", residual=False)), "layer",
        f"'{LAYER}.mlp.0.weight' belongs to 'layers.0.ffn' but lies outside"),
    "an exit that is not there": Lie(
        block("ffn", exit=BlockExit("mpl", residual=False)), "layer",
        f"exit of 'layers.0.ffn' names the module '{LAYER}.mpl'.*Did you mean '{LAYER}.mlp'"),
    "a skipped module that is not there": Lie(
        block("ffn", bypassed=("mlp_nrm",)), "layer",
        f"bypassed of 'layers.0.ffn' names the module '{LAYER}.mlp_nrm'.*Did you mean '{LAYER}.mlp_norm'"),
    "a residual in a block without one": Lie(
        block("attention", exit=BlockExit("attention")), "layer",
        r"'layers.0.attention' leaves through BlockExit\(.*residual=True.*\), in which the residual is not added"),
    "a norm before a block that is not skipped": Lie(
        block("attention", bypassed=()), "layer",
        f"'{LAYER}.attention_norm.weight' belongs to 'layers.0.attention' but lies outside.*add its module to bypassed",
    ),
    "a forgotten norm outside the layers": Lie(
        stem("norm"), "hidden", r"'toy.norm.weight' \(dimension 0, 24 long: no axis\)"),
    "a forgotten norm before a block": Lie(
        block("attention", "attention_norm"), "layer",
        f"'{LAYER}.attention_norm.weight' went with a removed block, but no row of the block describes it: add one"),
    "a norm with a mean as one without": Lie(
        block("attention", "attention.output.LayerNorm", norm("attention.output.LayerNorm", kind="rms")), "hidden",
        r"'bert.encoder.layer.0.attention.output.LayerNorm', declared by norm\(kind='rms'\)", of=bert),
    "a norm without a mean as one with": Lie(
        block("ffn", "layer.1.layer_norm", norm("layer.1.layer_norm")), "hidden",
        r"'encoder.block.0.layer.1.layer_norm', declared by norm\(kind='layer'\)", of=t5, head="EncoderModel"),
    "a forgotten table": Lie(
        stem("{token,position}_embeddings", embedding("token_embeddings")), "hidden",
        "these have no axis of hidden: 'toy.position_embeddings.weight'"),
    "a forgotten size attribute": Lie(
        block("attention", attributes=()), "head",
        f"fails in '{LAYER}.attention'.*belongs in the attributes of its block: num_heads = 4"),
    "a size attribute by another name": Lie(
        block("attention", attributes=(("attention", "heads", HEADS.of(1)),)), "head",
        f"'heads' of '{LAYER}.attention' is None, and should be 4"),
    "a size attribute that counts heads, described as elements": Lie(
        block("attention", attributes=(("attention", "num_heads", HEADS),)), "head",
        rf"'num_heads' of '{LAYER}.attention' is 4, and should be 24.*HEADS.of\(1\) counts heads"),
    "a forgotten row of a head": Lie(
        head(TAGS), "hidden",
        r"fails in 'classifier'.*'classifier.weight' \(dimension 0, 2 long: no axis; dimension 1, 24 long: no axis\)",
        of=bert, head=TAGS),
    "a head that is not said to read hidden dimensions": Lie(
        head(CLASSIFIER, linear("classifier")), "hidden",
        r"'classifier.weight' \(dimension 0, 2 long: no axis; dimension 1, 24 long: no axis\)"),
    "a row of a head with a path from the encoder": Lie(
        head(TAGS, linear("bert.classifier", reads=HIDDEN)), "hidden",
        "row 'bert.classifier' names the module 'bert.classifier', .*Did you mean 'classifier'", of=bert, head=TAGS),
    "a layer that runs more often": Lie(
        lambda family: replace(family, applications=None), "head",
        r"'albert.encoder.albert_layer_groups.0.albert_layers.0' runs 2 times.*`applications` says 1.*It is \(2\)",
        of=albert),
    "a parameter of the other block": Lie(
        each(block("ffn", "output.LayerNorm"), added("attention", norm("output.LayerNorm"))), "layer",
        "'bert.encoder.layer.0.output.LayerNorm.weight' belongs to 'layers.0.attention' but lies outside", of=bert),
    "a parameter of both blocks": Lie(
        added("attention", norm("output.LayerNorm")), "layer",
        "'bert.encoder.layer.0.output.LayerNorm.weight', which a row before it describes.*layers.0.attention and",
        of=bert),
    "norms of two blocks exchanged, and skipped so": Lie(
        each(
            block("attention", "attention_norm", norm("mlp_norm"), bypassed=("mlp_norm",)),
            block("ffn", "mlp_norm", norm("attention_norm"), bypassed=("attention_norm",))),
        "layer",
        f"Removing 'layers.0.attention' changes '{LAYER}.mlp.0'.*Removed with it.*'{LAYER}.mlp_norm': check bypassed"),
    "another dimension of a shared tensor": Lie(
        shared(dim=2), "head",
        rf"fails in '{BIAS}'.*Shared\(module='{BIAS}'.*dim=2.*check module, argument, keyword and dim", of=mpnet),
    "another argument for a shared tensor": Lie(
        shared(argument=1, keyword="attention_mask"), "head",
        rf"Shared\(module='{BIAS}', argument=1.*check module, argument, keyword and dim", of=mpnet),
    "a forgotten shared tensor": Lie(
        block("attention", shared=()), "head",
        rf"fails in '{BIAS}'.*an entry for every unit of layers.0.heads, its block needs Shared\(\.\.\.\)", of=mpnet),
    "another number of heads": Lie(
        lambda family: replace(family, sizes={"heads": 2}), "head",
        f"'num_heads' of '{LAYER}.attention' is 4, and should be 2.*sizes"),
    "another hidden size": Lie(
        lambda family: replace(family, sizes={"hidden": 12}), "hidden",
        f"parameter '{LAYER}.attention_norm.weight' has length 24 along 'hidden', which is not copies 1 x units 12"),
    "a setting of another name": Lie(
        lambda family: replace(family, config=ConfigSizes(intermediate="d_ff")), "intermediate",
        "None for 'd_ff', where the number of 'intermediate' units is expected.*ConfigSizes"),
    "a block size that does not fit": Lie(
        block("attention", QKV, linear(QKV, reads=HIDDEN, writes=HEADS.of(7))), None,
        "parameter 'bert.encoder.layer.0.attention.self.query.weight' has length 24 along 'heads'", of=bert),
    "copies that fit but are not there, in one of three": Lie(
        block("attention", QKV, KEY_VALUE, linear("attention.self.query", reads=HIDDEN, writes=HEADS.times(2))), None,
        "at fault is 'bert.encoder.layer.0.attention.self.query.weight'", of=bert),
    "copies that fit but are not there, in the projection": Lie(
        block("attention", "attention.output.dense", projection("attention.output.dense", reads=HEADS.times(2))),
        None, "at fault is 'bert.encoder.layer.0.attention.output.dense.weight'", of=bert),
    "three projections after one another, not head by head": Lie(
        block(
            "attention", "attention.self.in_proj",
            linear("attention.self.in_proj", reads=HIDDEN, writes=HEADS.times(3))),
        None, "at fault is 'deberta.encoder.layer.0.attention.self.in_proj.weight'", of=deberta, settings=RELATIVE),
    "a forgotten bias": Lie(
        block("attention", QKV, KEY_VALUE, Weights("attention.self.query", {"weight": (HEADS, HIDDEN)})), None,
        "'bert.encoder.layer.0.attention.self.query.bias'", of=bert),
    "a forgotten bias outside the layers": Lie(
        head_row(TRANSFORM, Weights(TRANSFORM, {"weight": (HIDDEN, HIDDEN)}, rows=(1, 0))), "hidden",
        "'cls.predictions.transform.dense.bias'", of=bert, head=MASKED),
    "a forgotten matrix": Lie(
        block("attention", QKV, linear("attention.self.{query,key}", reads=HIDDEN, writes=HEADS)), None,
        "'bert.encoder.layer.0.attention.self.value.weight'", of=bert),
    "a forgotten reader": Lie(stem("pooler.dense"), "hidden", "'bert.pooler.dense.weight'", of=bert),
    "another group": Lie(
        block("attention", QKV, KEY_VALUE, linear("attention.self.query", reads=HIDDEN, writes=HIDDEN)), None,
        "'bert.encoder.layer.0.attention.self.query.weight'", of=bert),
    "a norm described as weights": Lie(
        stem(
            "embeddings.LayerNorm",
            Weights("embeddings.LayerNorm", {"weight": (HIDDEN.scaled,), "bias": (HIDDEN.scaled,)})),
        "hidden", "'bert.embeddings.LayerNorm' with", of=bert),
    "a norm described as weights that are not scaled": Lie(
        stem("embeddings.LayerNorm", Weights("embeddings.LayerNorm", {"weight": (HIDDEN,), "bias": (HIDDEN,)})),
        "hidden", "at fault is 'bert.embeddings.LayerNorm.weight'", of=bert),
    "the wrong argument for an exit": Lie(
        block("ffn", exit=BlockExit("output", argument=0)), None,
        r"'layers.0.ffn' through BlockExit\(module='bert.encoder.layer.0.output', argument=0", of=bert),
    "the attention mask for an exit": Lie(
        block("attention", exit=BlockExit("attention", argument=1, outputs=2)), None,
        r"'layers.0.attention' through BlockExit\(module='deberta.encoder.layer.0.attention', argument=1", of=deberta,
        settings=RELATIVE),
    "the wrong number of outputs": Lie(
        block("attention", exit=BlockExit("attention", keyword="hidden_states", outputs=1)), None,
        "'layers.0.attention' through BlockExit", of=bert),
    "a residual that is not added": Lie(
        block("attention", exit=BlockExit("attention", outputs=2, residual=False)), None,
        r"'layers.0.attention' leaves through BlockExit\(.*the residual is added", of=bert),
    "a bias that no gate scales": Lie(
        block(
            "ffn", "output.dense",
            Weights("output.dense", {"weight": (HIDDEN.scaled, INTERMEDIATE.scaled)}, gated=True, rows=(1, 0)),
            Weights("output.dense", {"bias": (HIDDEN.scaled,)})),
        None, "'bert.encoder.layer.0.output.dense.bias' is not scaled by 'layers.0.ffn'", of=bert),
    "no projection": Lie(
        block("ffn", "output.dense", linear("output.dense", reads=INTERMEDIATE, writes=HIDDEN)), None,
        r"no projection\(...\) row of 'layers.0.ffn' reads 'intermediate'", of=bert),
    "removed positions that are read": Lie(
        block(
            "attention", "attention.self.{pos_proj,pos_q_proj}",
            linear("attention.self.{pos_proj,pos_q_proj}", reads=HIDDEN, writes=HEADS)),
        "hidden", "at fault is 'deberta.encoder.layer.0.attention.self.pos_proj.weight'", of=deberta,
        settings=RELATIVE),
    "a table that is read directly and scaled": Lie(
        stem("encoder.rel_embeddings", embedding("encoder.rel_embeddings")), "hidden",
        "at fault is 'deberta.encoder.rel_embeddings'", of=deberta, settings=RELATIVE),
    "a norm before a tied decoder": Lie(
        lambda family: replace(
                family,
                heads={
                    **family.heads,
                    "ForMaskedLM": tuple(replace(row, read_by=None) for row in family.heads["ForMaskedLM"]),
                },
        ),
        "hidden", "at fault is 'cls.predictions.transform.LayerNorm'", of=deberta, head=MASKED, settings=RELATIVE),
    "units that cannot be refused": Lie(
        lambda family: replace(family, refused={"layer": "no"}), None, "refused names", of=bert),
}  # fmt: skip


@pytest.fixture(scope="module")
def toy(example: Callable[[str], ModuleType]) -> Adapter:
    return example("custom_adapter").adapter


def check(lie: Lie, toy: Adapter) -> None:
    liar = Liar(lie.of or toy, lie.change)
    layers = 2 if lie.of is albert else 1
    settings = {**liar.test_settings, **lie.settings, "num_hidden_layers": layers}
    config = tiny_config(liar.model_types[0], **settings)
    with pytest.raises((LawError, AdapterError), match=re.compile(lie.named, re.DOTALL)):
        check_adapter(liar, heads=lie.head, units=lie.units, configs=[config])


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_caught_and_leads_to_the_row(lie: str, toy: Adapter) -> None:
    check(LIES[lie], toy)


@pytest.mark.slow
def test_a_forgotten_row_of_a_tied_decoder_is_named(toy: Adapter) -> None:
    """It shows when the model is loaded from its file, where the two are not tied yet; that is tried with all units."""
    named = "'cls.predictions.decoder.weight' is tied to .*needs a row of its own"
    check(Lie(head_row("cls.predictions.decoder"), None, named, of=bert, head=MASKED), toy)


@pytest.mark.slow
@pytest.mark.parametrize("units", ["head", "layer", "hidden"])
def test_the_truth_passes_where_the_lies_do_not(units: str, toy: Adapter) -> None:
    for true, head_class in ((toy, CLASSIFIER), (mpnet, CLASSIFIER), (albert, CLASSIFIER), (t5, "EncoderModel")):
        liar = Liar(true, lambda family: family)
        config = tiny_config(liar.model_types[0], **liar.test_settings)
        assert check_adapter(liar, heads=head_class, units=units, configs=[config]).cases

"""One thing that an adapter says wrongly, of each kind: `check_adapter` names the parameter and what to correct.

More kinds are in `test_adapter.py`. Each lie is told about the toy encoder of the examples where that has what is lied
about, and else about a family of transformers.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from cofiprune_adapters.mpnet import adapter as mpnet
from cofiprune_adapters.t5 import adapter as t5

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

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
IN_PROJ, OUT_PROJ = "attention.in_proj", "attention.out_proj"
LAYER = "toy.layers.0"
QKV = "attention.self.{query,key,value}"
SELF = "bert.encoder.layer.0.attention.self"
BIAS = "mpnet.encoder.layer.0.attention.attn"

# The adapter (None: the toy's), what is changed in it, the head class, the units under which it shows (None: all), and
# what the error must say.
LIES: dict[str, tuple[Adapter | None, Change, str, str | None, str]] = {
    "axes of a square projection swapped": (
        None,
        block("attention", OUT_PROJ, unscaled(OUT_PROJ, (HEADS.scaled, HIDDEN.scaled), (HIDDEN.scaled,))),
        CLASSIFIER,
        "head",
        rf"'{LAYER}.attention.out_proj.weight' \(dimension 0, 24 long: layers.0.heads.*needs its axis, and no other",
    ),
    "axes of an oblong projection swapped": (
        None,
        block("ffn", "mlp.0", linear("mlp.0", reads=INTERMEDIATE, writes=HIDDEN)),
        CLASSIFIER,
        "intermediate",
        f"parameter '{LAYER}.mlp.0.weight' has length 34 along 'hidden'",
    ),
    "queries, keys and values after one another, described head by head": (
        None,
        block("attention", IN_PROJ, linear(IN_PROJ, reads=HIDDEN, writes=HEADS)),
        CLASSIFIER,
        "head",
        f"at fault is '{LAYER}.attention.in_proj.weight'.*block 18, slice.*copies, block, role",
    ),
    "too few copies": (
        None,
        block("attention", IN_PROJ, linear(IN_PROJ, reads=HIDDEN, writes=HEADS.times(2))),
        CLASSIFIER,
        "head",
        f"at fault is '{LAYER}.attention.in_proj.weight'.*copies 2 x units 4 x block 9",
    ),
    "heads strided in one row for three projections": (
        bert,
        block("attention", QKV, linear(QKV, reads=HIDDEN, writes=HEADS.times(6))),
        CLASSIFIER,
        "head",
        f"at fault is '{SELF}.query.weight'.*copies 6 x units 4 x block 1",
    ),
    "heads strided in all of attention": (
        None,
        each(
            block("attention", IN_PROJ, linear(IN_PROJ, reads=HIDDEN, writes=HEADS.times(18))),
            block("attention", OUT_PROJ, projection(OUT_PROJ, reads=HEADS.times(6))),
        ),
        CLASSIFIER,
        "head",
        f"at fault is '{LAYER}.attention.in_proj.weight'.*copies 18 x units 4 x block 1",
    ),
    "an exit at the projection, before the residual norm": (
        bert,
        block("ffn", exit=BlockExit("output.dense")),
        CLASSIFIER,
        "layer",
        "'bert.encoder.layer.0.output.LayerNorm.weight' belongs to 'layers.0.ffn' but lies outside.*move the exit up",
    ),
    "an exit at the other block": (
        None,
        block("ffn", exit=BlockExit("attention", residual=False)),
        CLASSIFIER,
        "layer",
        f"'{LAYER}.mlp.0.weight' belongs to 'layers.0.ffn' but lies outside",
    ),
    "an exit that is not there": (
        None,
        block("ffn", exit=BlockExit("mpl", residual=False)),
        CLASSIFIER,
        "layer",
        f"exit of 'layers.0.ffn' names the module '{LAYER}.mpl'.*Did you mean '{LAYER}.mlp'",
    ),
    "a skipped module that is not there": (
        None,
        block("ffn", bypassed=("mlp_nrm",)),
        CLASSIFIER,
        "layer",
        f"bypassed of 'layers.0.ffn' names the module '{LAYER}.mlp_nrm'.*Did you mean '{LAYER}.mlp_norm'",
    ),
    "a residual in a block without one": (
        None,
        block("attention", exit=BlockExit("attention")),
        CLASSIFIER,
        "layer",
        r"'layers.0.attention' leaves through BlockExit\(.*residual=True.*\), in which the residual is not added",
    ),
    "a norm before a block that is not skipped": (
        None,
        block("attention", bypassed=()),
        CLASSIFIER,
        "layer",
        f"'{LAYER}.attention_norm.weight' belongs to 'layers.0.attention' but lies outside.*add its module to bypassed",
    ),
    "a forgotten norm outside the layers": (
        None,
        stem("norm"),
        CLASSIFIER,
        "hidden",
        r"'toy.norm.weight' \(dimension 0, 24 long: no axis\)",
    ),
    "a forgotten norm before a block": (
        None,
        block("attention", "attention_norm"),
        CLASSIFIER,
        "layer",
        f"'{LAYER}.attention_norm.weight' went with a removed block, but no row of the block describes it: add one",
    ),
    "a norm with a mean as one without": (
        bert,
        block("attention", "attention.output.LayerNorm", norm("attention.output.LayerNorm", kind="rms")),
        CLASSIFIER,
        "hidden",
        r"'bert.encoder.layer.0.attention.output.LayerNorm', declared by norm\(kind='rms'\)",
    ),
    "a norm without a mean as one with": (
        t5,
        block("ffn", "layer.1.layer_norm", norm("layer.1.layer_norm")),
        "EncoderModel",
        "hidden",
        r"'encoder.block.0.layer.1.layer_norm', declared by norm\(kind='layer'\)",
    ),
    "a forgotten table": (
        None,
        stem("{token,position}_embeddings", embedding("token_embeddings")),
        CLASSIFIER,
        "hidden",
        "these have no axis of hidden: 'toy.position_embeddings.weight'",
    ),
    "a forgotten size attribute": (
        None,
        block("attention", attributes=()),
        CLASSIFIER,
        "head",
        f"fails in '{LAYER}.attention'.*belongs in the attributes of its block: num_heads = 4",
    ),
    "a size attribute by another name": (
        None,
        block("attention", attributes=(("attention", "heads", HEADS.of(1)),)),
        CLASSIFIER,
        "head",
        f"'heads' of '{LAYER}.attention' is None, and should be 4",
    ),
    "a size attribute that counts heads, described as elements": (
        None,
        block("attention", attributes=(("attention", "num_heads", HEADS),)),
        CLASSIFIER,
        "head",
        rf"'num_heads' of '{LAYER}.attention' is 4, and should be 24.*HEADS.of\(1\) counts heads",
    ),
    "a forgotten row of a head": (
        bert,
        head(TAGS),
        TAGS,
        "hidden",
        r"fails in 'classifier'.*'classifier.weight' \(dimension 0, 2 long: no axis; dimension 1, 24 long: no axis\)",
    ),
    "a head that is not said to read hidden dimensions": (
        None,
        head(CLASSIFIER, linear("classifier")),
        CLASSIFIER,
        "hidden",
        r"'classifier.weight' \(dimension 0, 2 long: no axis; dimension 1, 24 long: no axis\)",
    ),
    "a row of a head with a path from the encoder": (
        bert,
        head(TAGS, linear("bert.classifier", reads=HIDDEN)),
        TAGS,
        "hidden",
        "row 'bert.classifier' names the module 'bert.classifier', .*Did you mean 'classifier'",
    ),
    "a layer that runs more often": (
        albert,
        lambda family: replace(family, applications=None),
        CLASSIFIER,
        "head",
        r"'albert.encoder.albert_layer_groups.0.albert_layers.0' runs 2 times.*`applications` says 1.*It is \(2\)",
    ),
    "a parameter of the other block": (
        bert,
        each(block("ffn", "output.LayerNorm"), added("attention", norm("output.LayerNorm"))),
        CLASSIFIER,
        "layer",
        "'bert.encoder.layer.0.output.LayerNorm.weight' belongs to 'layers.0.attention' but lies outside",
    ),
    "a parameter of both blocks": (
        bert,
        added("attention", norm("output.LayerNorm")),
        CLASSIFIER,
        "layer",
        "'bert.encoder.layer.0.output.LayerNorm.weight', which a row before it describes.*layers.0.attention and",
    ),
    "norms of two blocks exchanged, and skipped so": (
        None,
        each(
            block("attention", "attention_norm", norm("mlp_norm"), bypassed=("mlp_norm",)),
            block("ffn", "mlp_norm", norm("attention_norm"), bypassed=("attention_norm",)),
        ),
        CLASSIFIER,
        "layer",
        f"Removing 'layers.0.attention' changes '{LAYER}.mlp.0'.*Removed with it.*'{LAYER}.mlp_norm': check bypassed",
    ),
    "another dimension of a shared tensor": (
        mpnet,
        shared(dim=2),
        CLASSIFIER,
        "head",
        rf"fails in '{BIAS}'.*Shared\(module='{BIAS}'.*dim=2.*check module, argument, keyword and dim",
    ),
    "another argument for a shared tensor": (
        mpnet,
        shared(argument=1, keyword="attention_mask"),
        CLASSIFIER,
        "head",
        rf"Shared\(module='{BIAS}', argument=1.*check module, argument, keyword and dim",
    ),
    "a forgotten shared tensor": (
        mpnet,
        block("attention", shared=()),
        CLASSIFIER,
        "head",
        rf"fails in '{BIAS}'.*an entry for every unit of layers.0.heads, its block needs Shared\(\.\.\.\)",
    ),
    "another number of heads": (
        None,
        lambda family: replace(family, sizes={"heads": 2}),
        CLASSIFIER,
        "head",
        f"'num_heads' of '{LAYER}.attention' is 4, and should be 2.*sizes",
    ),
    "another hidden size": (
        None,
        lambda family: replace(family, sizes={"hidden": 12}),
        CLASSIFIER,
        "hidden",
        f"parameter '{LAYER}.attention_norm.weight' has length 24 along 'hidden', which is not copies 1 x units 12",
    ),
    "a setting of another name": (
        None,
        lambda family: replace(family, config=ConfigSizes(intermediate="d_ff")),
        CLASSIFIER,
        "intermediate",
        "None for 'd_ff', where the number of 'intermediate' units is expected.*ConfigSizes",
    ),
}


@pytest.fixture(scope="module")
def toy() -> Iterator[Adapter]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("custom_adapter").adapter


def lie_about(true: Adapter, change: Change, head_class: str, units: str | None, named: str) -> None:
    liar = Liar(true, change)
    layers = 2 if true is albert else 1
    config = tiny_config(liar.model_types[0], **{**liar.test_settings, "num_hidden_layers": layers})
    with pytest.raises((LawError, AdapterError), match=re.compile(named, re.DOTALL)):
        check_adapter(liar, heads=head_class, units=units, configs=[config])


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_caught_and_leads_to_the_row(lie: str, toy: Adapter) -> None:
    true, change, head_class, units, named = LIES[lie]
    lie_about(true or toy, change, head_class, units, named)


@pytest.mark.slow
def test_a_forgotten_row_of_a_tied_decoder_is_named() -> None:
    """It shows when the model is loaded from its file, where the two are not tied yet; that is tried with all units."""

    def change(family: Family) -> Family:
        rows = exchanged(family.heads[MASKED], "cls.predictions.decoder")
        return head(MASKED, *rows)(family)

    lie_about(bert, change, MASKED, None, "'cls.predictions.decoder.weight' is tied to .*needs a row of its own")


@pytest.mark.slow
@pytest.mark.parametrize("units", ["head", "layer", "hidden"])
def test_the_truth_passes_where_the_lies_do_not(units: str, toy: Adapter) -> None:
    for true, head_class in ((toy, CLASSIFIER), (mpnet, CLASSIFIER), (albert, CLASSIFIER), (t5, "EncoderModel")):
        liar = Liar(true, lambda family: family)
        config = tiny_config(liar.model_types[0], **liar.test_settings)
        assert check_adapter(liar, heads=head_class, units=units, configs=[config]).cases

"""The battery for BERT's relatives, head class by head class: other places for norms, embeddings, residuals, biases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import transformers
from transformers import PretrainedConfig

import cofiprune
from cofiprune.conformance.specimens import head_classes, tiny_config
from cofiprune.structure import UNIT_KINDS

ENGLISH = {"default_language": "en_XX"}
ROC = {"pronunciation_vocab_size": 30, "pronunciation_embed_dim": 10, "shape_vocab_size": 30, "shape_embed_dim": 11}
ADDED = {"concat_input": False, "pronunciation_embed_dim": 24, "shape_embed_dim": 24}
ALL = None
SOME = ("Model", "ForMaskedLM")

# Name of the case: model type, settings beside the sizes, endings of the head classes (None for all).
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any], tuple[str, ...] | None]] = {
    "electra": ("electra", {}, ALL),
    # As google/electra-small-discriminator, and a summary without a projection.
    "electra-narrow": (
        "electra",
        {"embedding_size": 10, "summary_use_proj": False},
        ("Model", "ForMaskedLM", "ForPreTraining", "ForMultipleChoice"),
    ),
    "distilbert": ("distilbert", {}, ALL),
    "distilbert-untied": ("distilbert", {"tie_word_embeddings": False}, ("ForMaskedLM",)),
    "mpnet": ("mpnet", {}, ALL),
    "ernie": ("ernie", {}, ALL),
    "ernie-tasks": ("ernie", {"use_task_id": True}, SOME),
    "roc_bert": ("roc_bert", ROC, ALL),
    "roc_bert-added": ("roc_bert", {**ROC, **ADDED}, SOME),
    "layoutlm": ("layoutlm", {}, ALL),
    "megatron-bert": ("megatron-bert", {}, ALL),
    "roberta-prelayernorm": ("roberta-prelayernorm", {}, ALL),
    "xlm-roberta-xl": ("xlm-roberta-xl", {}, ALL),
    "data2vec-text": ("data2vec-text", {}, ALL),
    "rembert": ("rembert", {"input_embedding_size": 10, "output_embedding_size": 14}, ALL),
    "roformer": ("roformer", {}, ALL),
    "roformer-narrow": ("roformer", {"embedding_size": 10, "rotary_value": True}, SOME),
    "xmod": ("xmod", {**ENGLISH, "languages": ["de_DE", "en_XX"]}, ALL),
    # As facebook/xmod-base, but for the sizes and languages.
    "xmod-adapter-norm": ("xmod", {**ENGLISH, "adapter_layer_norm": True, "ln_before_adapter": False}, SOME),
    "xmod-bare": ("xmod", {**ENGLISH, "adapter_reuse_layer_norm": False}, SOME),
    "xmod-pre-norm": ("xmod", {**ENGLISH, "pre_norm": True}, SOME),
}


def config_of(family: str) -> PretrainedConfig:
    """The small configuration of a case."""
    model_type, settings, _ = FAMILIES[family]
    config = tiny_config(model_type)
    entries = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    return type(config)(**{**entries, **settings})


def models() -> Iterator[Any]:
    """Every case with every of its head classes."""
    for family, (_, _, endings) in FAMILIES.items():
        for cls in head_classes(config_of(family)):
            if endings is None or cls.__name__.endswith(endings):
                yield pytest.param(family, cls.__name__, id=f"{family}-{cls.__name__}")


@pytest.mark.parametrize(("family", "head"), list(models()))
def test_every_law_holds(family: str, head: str) -> None:
    """All unit choices for the bare encoder; with a head, which only reads the hidden dimensions, all kinds at once."""
    bare = head.endswith("Model")
    model = getattr(transformers, head)(config_of(family))
    report = cofiprune.check_adapter(model, units=None if bare else UNIT_KINDS)
    assert report.heads == (head,)
    assert report.cases == (42 if bare else 6)
    assert not report.refused
    assert not report.skipped
    assert report.largest_difference <= 1e-10

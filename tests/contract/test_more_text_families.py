"""The whole battery for the text families beyond BERT's nearest relatives, head class by head class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig

import cofiprune
from cofiprune.conformance.specimens import head_classes, tiny_config

ALL = None

# Name of the case: model type, settings beside the sizes, endings of the head classes (None for all).
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any], tuple[str, ...] | None]] = {
    # A window of 4 tokens: the second of three layers attends locally.
    "modernbert": ("modernbert", {"num_hidden_layers": 3, "local_attention": 4}, ALL),
    "modernbert-biased": (
        "modernbert",
        {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_pooling": "mean"},
        ("ForMaskedLM", "ForSequenceClassification"),
    ),
    "modernbert-untied": ("modernbert", {"tie_word_embeddings": False}, ("ForMaskedLM",)),
    "albert": ("albert", {"embedding_size": 10}, ALL),
    "albert-groups": (
        "albert",
        {"embedding_size": 10, "num_hidden_layers": 3, "num_hidden_groups": 2, "inner_group_num": 2},
        ("ForTokenClassification",),
    ),
    # As facebook/esm2_t6_8M_UR50D.
    "esm": ("esm", {"position_embedding_type": "rotary", "token_dropout": True, "mask_token_id": 3}, ALL),
    # As facebook/esm1b_t33_650M_UR50S.
    "esm-absolute": ("esm", {"emb_layer_norm_before": True}, ("Model", "ForMaskedLM")),
    "nomic": ("nomic_bert", {}, ALL),
    "gte": ("gte", {}, ALL),
    "jina": ("jina_embeddings_v3", {}, ALL),
    "gte-no-types": ("gte", {"type_vocab_size": 0}, ("Model",)),
    # Four query heads that share two pairs of keys and values.
    "eurobert": ("eurobert", {"num_key_value_heads": 2}, ALL),
    "eurobert-tied": (
        "eurobert",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "classifier_pooling": "mean"},
        ("ForMaskedLM", "ForSequenceClassification"),
    ),
    # As t5-small; three layers, so that the first layer's table serves two others.
    "t5": ("t5", {"num_layers": 3}, ("EncoderModel", "ForTokenClassification")),
    # As t5-v1_1-small.
    "t5-gated": ("t5", {"feed_forward_proj": "gated-gelu"}, ("EncoderModel",)),
    "mt5": ("mt5", {}, ("EncoderModel",)),
    "umt5": ("umt5", {}, ("EncoderModel", "ForTokenClassification")),
}


def config_of(family: str) -> PretrainedConfig:
    """The small configuration of a case."""
    model_type, settings, _ = FAMILIES[family]
    config = tiny_config(model_type)
    entries = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "layer_types")}
    return type(config)(**{**entries, **settings})


def models() -> Iterator[Any]:
    """Every case with every of its head classes."""
    for family, (model_type, _, endings) in FAMILIES.items():
        if model_type not in CONFIG_MAPPING:  # an earlier transformers, which does not have it
            continue
        for cls in head_classes(config_of(family)):
            if endings is None or cls.__name__.endswith(endings):
                yield pytest.param(family, cls.__name__, id=f"{family}-{cls.__name__}")


@pytest.mark.parametrize(("family", "head"), list(models()))
def test_every_law_holds(family: str, head: str) -> None:
    report = cofiprune.check_adapter(getattr(transformers, head)(config_of(family)))
    assert report.heads == (head,)
    assert report.cases == 42
    assert not report.refused
    assert not report.skipped
    assert report.largest_difference <= 1e-10


def test_a_unit_of_heads_is_a_group_of_queries_with_its_keys_and_values() -> None:
    model = transformers.EuroBertModel(config_of("eurobert"))
    structure = cofiprune.structure(model)
    assert structure["layers.0.heads"].size == 2
    query, key = (
        next(spec for spec in structure.parameters if spec.name == f"layers.0.self_attn.{name}_proj.weight")
        for name in "qk"
    )
    assert query.sides[0] is not None
    assert key.sides[0] is not None
    assert (query.sides[0].block, key.sides[0].block) == (12, 6)

"""ALBERT (Lan et al., 2020, arXiv:1909.11942): BERT's blocks, shared by many layers, behind narrow embeddings.

A group of layers has one set of weights and is applied several times. Its units are cut once, for every application,
and its parameters are counted once; multiply-accumulates count every application.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from cofiprune.adapter import (
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    Adapter,
    BlockTable,
    Family,
    embedding,
    linear,
    norm,
    projection,
)
from cofiprune.structure import BlockExit

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MASKED_LM = (linear("predictions.dense", reads=HIDDEN), linear("predictions.decoder"))


class AlbertAdapter(Adapter):
    """ALBERT with every head that transformers has for it."""

    model_types = ("albert",)

    def describe(self, config: PretrainedConfig) -> Family:
        return Family(
            sizes={
                "hidden": config.hidden_size,
                "heads": config.num_attention_heads,
                "intermediate": config.intermediate_size,
            },
            layers="encoder.albert_layer_groups.*.albert_layers",
            applications=applications(config),
            stem=(
                embedding("embeddings.{word,position,token_type}_embeddings", writes=None),
                linear("encoder.embedding_hidden_mapping_in", writes=HIDDEN.scaled),
                linear("pooler", reads=HIDDEN, rows=(0, 1), optional=True),
            ),
            attention=BlockTable(
                rows=(
                    linear("attention.{query,key,value}", reads=HIDDEN, writes=HEADS),
                    projection("attention.dense", reads=HEADS),
                    norm("attention.LayerNorm"),
                ),
                exit=BlockExit("attention", outputs=2),
                attributes=(
                    ("attention", "num_attention_heads", HEADS.of(1)),
                    ("attention", "all_head_size", HEADS),
                ),
            ),
            ffn=BlockTable(
                rows=(
                    linear("ffn", reads=HIDDEN, writes=INTERMEDIATE),
                    projection("ffn_output", reads=INTERMEDIATE),
                    norm("full_layer_layer_norm"),
                ),
                exit=BlockExit("full_layer_layer_norm"),
                bypassed=("ffn", "activation", BlockExit("ffn_output", residual=False)),
            ),
            heads={
                "ForSequenceClassification": (),
                "ForMultipleChoice": (),
                "ForTokenClassification": (linear("classifier", reads=HIDDEN),),
                "ForQuestionAnswering": (linear("qa_outputs", reads=HIDDEN),),
                "ForMaskedLM": MASKED_LM,
                "ForPreTraining": MASKED_LM,
            },
        )


def applications(config: PretrainedConfig) -> tuple[int, ...]:
    """How often each layer that has weights of its own is applied, group by group."""
    per_group = config.num_hidden_layers / config.num_hidden_groups
    counts = Counter(int(layer / per_group) for layer in range(config.num_hidden_layers))
    return tuple(counts[group] for group in range(config.num_hidden_groups) for _ in range(config.inner_group_num))


adapter = AlbertAdapter()

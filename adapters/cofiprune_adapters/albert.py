"""ALBERT (Lan et al., 2020, arXiv:1909.11942): BERT's blocks, shared by many layers, behind narrow embeddings.

A group of layers has one set of weights and is applied several times. Its units are cut once, for every application,
and its parameters are counted once; multiply-accumulates count every application.
"""

from collections import Counter

from transformers import PretrainedConfig

from cofiprune.adapter import (
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    BlockExit,
    BlockTable,
    Family,
    embedding,
    family,
    linear,
    norm,
    projection,
)
from cofiprune_adapters import bert

MASKED_LM = (linear("predictions.dense", reads=HIDDEN), linear("predictions.decoder"))


@family("albert")
def adapter(config: PretrainedConfig) -> Family:
    return Family(
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
            attributes=bert.head_counts("attention"),
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
            **bert.TOKEN_HEADS,
            "ForMaskedLM": MASKED_LM,
            "ForPreTraining": MASKED_LM,
        },
    )


def applications(config: PretrainedConfig) -> tuple[int, ...]:
    """The number of applications of each layer that has weights of its own, group by group."""
    per_group = config.num_hidden_layers / config.num_hidden_groups
    counts = Counter(int(layer / per_group) for layer in range(config.num_hidden_layers))
    return tuple(counts[group] for group in range(config.num_hidden_groups) for _ in range(config.inner_group_num))

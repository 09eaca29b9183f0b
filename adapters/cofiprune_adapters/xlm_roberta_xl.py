"""XLM-RoBERTa-XL and XXL (Goyal et al., 2021, arXiv:2105.00572): RoBERTa with the norms before its blocks.

The embeddings have no norm; the encoder ends in one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cofiprune.adapter import (
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    BlockTable,
    Family,
    embedding,
    linear,
    norm,
    projection,
)
from cofiprune.structure import BlockExit
from cofiprune_adapters import bert, roberta

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ATTENTION = replace(
    bert.ATTENTION,
    rows=(
        norm("attention.self_attn_layer_norm"),
        linear("attention.self.{query,key,value}", reads=HIDDEN, writes=HEADS),
        projection("attention.output.dense", reads=HEADS),
    ),
)
FFN = BlockTable(
    rows=(
        norm("LayerNorm"),
        linear("intermediate.dense", reads=HIDDEN, writes=INTERMEDIATE),
        projection("output.dense", reads=INTERMEDIATE),
    ),
    exit=BlockExit("output", argument=1, keyword="input_tensor"),
    bypassed=("LayerNorm", "intermediate"),
)


class XLMRobertaXLAdapter(roberta.RobertaAdapter):
    """XLM-RoBERTa-XL with every head that transformers has for it."""

    model_types = ("xlm-roberta-xl",)

    def describe(self, config: PretrainedConfig) -> Family:
        stem = (
            embedding("embeddings.{word,position,token_type}_embeddings"),
            norm("encoder.LayerNorm"),
            linear("pooler.dense", reads=HIDDEN, rows=(0, 1), optional=True),
        )
        return replace(super().describe(config), stem=stem, attention=ATTENTION, ffn=FFN)


adapter = XLMRobertaXLAdapter()

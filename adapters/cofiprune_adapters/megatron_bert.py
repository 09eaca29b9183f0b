"""MegatronBERT (Shoeybi et al., 2019, arXiv:1909.08053): BERT with the norms before its blocks and one at the end."""

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
from cofiprune_adapters import bert

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ATTENTION = replace(
    bert.ATTENTION,
    rows=(
        norm("attention.ln"),
        linear("attention.self.{query,key,value}", reads=HIDDEN, writes=HEADS),
        projection("attention.output.dense", reads=HEADS),
    ),
)
FFN = BlockTable(
    rows=(
        norm("ln"),
        linear("intermediate.dense", reads=HIDDEN, writes=INTERMEDIATE),
        projection("output.dense", reads=INTERMEDIATE),
    ),
    exit=BlockExit("output", argument=1, keyword="input_tensor"),
    bypassed=("ln", "intermediate"),
)


class MegatronBertAdapter(bert.BertAdapter):
    """MegatronBERT with every head that transformers has for it."""

    model_types = ("megatron-bert",)

    def describe(self, config: PretrainedConfig) -> Family:
        stem = (
            embedding("embeddings.{word,position,token_type}_embeddings"),
            norm("encoder.ln"),
            linear("pooler.dense", reads=HIDDEN, rows=(0, 1), optional=True),
        )
        return replace(super().describe(config), stem=stem, attention=ATTENTION, ffn=FFN)


adapter = MegatronBertAdapter()

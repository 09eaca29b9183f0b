"""RoBERTa-PreLayerNorm (Wettig et al., 2023, arXiv:2202.08005): RoBERTa with the norms before its blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cofiprune.adapter import HEADS, HIDDEN, INTERMEDIATE, BlockTable, Family, linear, norm, projection
from cofiprune.structure import BlockExit
from cofiprune_adapters import bert, roberta

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ATTENTION = replace(
    bert.ATTENTION,
    rows=(
        norm("attention.LayerNorm"),
        linear("attention.self.{query,key,value}", reads=HIDDEN, writes=HEADS),
        projection("attention.output.dense", reads=HEADS),
    ),
)
FFN = BlockTable(
    rows=(
        norm("intermediate.LayerNorm"),
        linear("intermediate.dense", reads=HIDDEN, writes=INTERMEDIATE),
        projection("output.dense", reads=INTERMEDIATE),
    ),
    exit=BlockExit("output", argument=1, keyword="input_tensor"),
    bypassed=("intermediate",),
)


class RobertaPreLayerNormAdapter(roberta.RobertaAdapter):
    """RoBERTa-PreLayerNorm with every head that transformers has for it."""

    model_types = ("roberta-prelayernorm",)

    def describe(self, config: PretrainedConfig) -> Family:
        family = super().describe(config)
        return replace(family, stem=(*family.stem, norm("LayerNorm")), attention=ATTENTION, ffn=FFN)


adapter = RobertaPreLayerNormAdapter()

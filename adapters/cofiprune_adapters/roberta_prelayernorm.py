"""RoBERTa-PreLayerNorm (Wettig et al., 2023, arXiv:2202.08005): RoBERTa with the norms before its blocks."""

from dataclasses import replace

from transformers import PretrainedConfig

from cofiprune.adapter import Family, family, norm
from cofiprune_adapters import bert, roberta

ATTENTION, FFN = bert.pre_norm("attention.LayerNorm", "intermediate.LayerNorm")


@family("roberta-prelayernorm")
def adapter(config: PretrainedConfig) -> Family:
    plain = roberta.adapter.describe(config)
    ffn = replace(FFN, bypassed=("intermediate",))  # which runs the norm itself
    return replace(plain, stem=(*plain.stem, norm("LayerNorm")), attention=ATTENTION, ffn=ffn)

"""XLM-RoBERTa-XL and XXL (Goyal et al., 2021, arXiv:2105.00572): RoBERTa with the norms before its blocks.

The embeddings have no norm; the encoder ends in one.
"""

from dataclasses import replace

from transformers import PretrainedConfig

from cofiprune.adapter import Family, family, norm
from cofiprune_adapters import bert, roberta

ATTENTION, FFN = bert.pre_norm("attention.self_attn_layer_norm", "LayerNorm")


@family("xlm-roberta-xl")
def adapter(config: PretrainedConfig) -> Family:
    stem = (bert.TABLES, norm("encoder.LayerNorm"), bert.POOLER)
    return replace(roberta.adapter.describe(config), stem=stem, attention=ATTENTION, ffn=FFN)

"""MegatronBERT (Shoeybi et al., 2019, arXiv:1909.08053): BERT with the norms before its blocks and one at the end."""

from dataclasses import replace

from transformers import PretrainedConfig

from cofiprune.adapter import Family, family, norm
from cofiprune_adapters import bert

ATTENTION, FFN = bert.pre_norm("attention.ln", "ln")


@family("megatron-bert")
def adapter(config: PretrainedConfig) -> Family:
    stem = (bert.TABLES, norm("encoder.ln"), bert.POOLER)
    return replace(bert.adapter.describe(config), stem=stem, attention=ATTENTION, ffn=FFN)

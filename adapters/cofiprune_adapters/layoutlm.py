"""LayoutLM v1 (Xu et al., 2020, arXiv:1912.13318): BERT with embeddings of where on the page a token stands."""

from dataclasses import replace

from transformers import PretrainedConfig

from cofiprune.adapter import BlockExit, Family, embedding, family
from cofiprune_adapters import bert


@family("layoutlm")
def adapter(config: PretrainedConfig) -> Family:
    plain = bert.adapter.describe(config)
    stem = (*plain.stem, embedding("embeddings.{x,y,h,w}_position_embeddings"))
    attention = replace(bert.ATTENTION, exit=BlockExit("attention", keyword="hidden_states"))
    return replace(plain, stem=stem, attention=attention)

"""LayoutLM (Xu et al., 2020, arXiv:1912.13318): BERT with embeddings of where on the page a token stands."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cofiprune.adapter import Family, embedding
from cofiprune.structure import BlockExit
from cofiprune_adapters.bert import ATTENTION, BertAdapter

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class LayoutLMAdapter(BertAdapter):
    """LayoutLM (v1) with every head that transformers has for it."""

    model_types = ("layoutlm",)

    def describe(self, config: PretrainedConfig) -> Family:
        family = super().describe(config)
        stem = (*family.stem, embedding("embeddings.{x,y,h,w}_position_embeddings"))
        attention = replace(ATTENTION, exit=BlockExit("attention", keyword="hidden_states"))
        return replace(family, stem=stem, attention=attention)


adapter = LayoutLMAdapter()

"""ERNIE (Sun et al., 2020, arXiv:1907.12412): BERT with embeddings of the task beside those of the token."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cofiprune.adapter import Family, embedding
from cofiprune_adapters.bert import BertAdapter

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class ErnieAdapter(BertAdapter):
    """ERNIE (1.0 to 3.0) with every head that transformers has for it."""

    model_types = ("ernie",)

    def describe(self, config: PretrainedConfig) -> Family:
        family = super().describe(config)
        return replace(family, stem=(*family.stem, embedding("embeddings.task_type_embeddings", optional=True)))


adapter = ErnieAdapter()

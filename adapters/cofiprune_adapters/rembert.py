"""RemBERT (Chung et al., 2021, arXiv:2010.12821): BERT's blocks between embeddings of other widths.

The input embeddings and the embeddings of the masked language modelling head are apart, each with a width of its own;
the projections between them and the encoder write and read the hidden dimensions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cofiprune.adapter import HIDDEN, Family, embedding, linear
from cofiprune_adapters.bert import BertAdapter

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class RemBertAdapter(BertAdapter):
    """RemBERT with every head that transformers has for it."""

    model_types = ("rembert",)

    def describe(self, config: PretrainedConfig) -> Family:
        family = super().describe(config)
        stem = (
            embedding("embeddings.{word,position,token_type}_embeddings", writes=None),
            linear("encoder.embedding_hidden_mapping_in", writes=HIDDEN.scaled),
            linear("pooler.dense", reads=HIDDEN, rows=(0, 1), optional=True),
        )
        masked_lm = (linear("cls.predictions.dense", reads=HIDDEN), linear("cls.predictions.decoder"))
        return replace(family, stem=stem, heads={**family.heads, "ForMaskedLM": masked_lm})


adapter = RemBertAdapter()

"""RoFormer (Su et al., 2021, arXiv:2104.09864): BERT's blocks with rotary positions.

The positions turn the queries and keys inside a head, by a fixed table that all heads share and no unit cuts. The token
embeddings may be narrower than the hidden size and are then projected to it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cofiprune.adapter import HIDDEN, Family, embedding, linear, norm
from cofiprune_adapters.bert import MASKED_LM, BertAdapter
from cofiprune_adapters.electra import summary

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NARROW_MASKED_LM = (linear("cls.predictions.transform.dense", reads=HIDDEN), linear("cls.predictions.decoder"))


class RoFormerAdapter(BertAdapter):
    """RoFormer with every head that transformers has for it."""

    model_types = ("roformer",)

    def describe(self, config: PretrainedConfig) -> Family:
        family = super().describe(config)
        wide = config.embedding_size == config.hidden_size
        stem = (
            embedding("embeddings.{word,token_type}_embeddings", writes=HIDDEN if wide else None),
            *((norm("embeddings.LayerNorm"),) if wide else (linear("embeddings_project", writes=HIDDEN.scaled),)),
            embedding("encoder.embed_positions", writes=None),
        )
        heads = {
            **family.heads,
            "ForSequenceClassification": (linear("classifier.dense", reads=HIDDEN, rows=(0, 1)),),
            "ForMultipleChoice": (summary(config),),
            "ForMaskedLM": MASKED_LM if wide else NARROW_MASKED_LM,
        }
        return replace(family, stem=stem, heads=heads)


adapter = RoFormerAdapter()

"""RoCBert (Su et al., 2022, doi:10.18653/v1/2022.acl-long.65): BERT's blocks behind embeddings of words, their
shapes and their pronunciations.

The three are joined and projected to the hidden size (`concat_input`), or added where they are as wide as it is.
Joined, they are no part of the residual stream, and keep their width; so does what reads the words' table as a matrix.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from cofiprune.adapter import HIDDEN, Adapter, Family, embedding, linear, norm
from cofiprune_adapters.bert import ATTENTION, FFN, MASKED_LM

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WIDE_MASKED_LM = (linear("cls.predictions.transform.dense", reads=HIDDEN), linear("cls.predictions.decoder"))


class RoCBertAdapter(Adapter):
    """RoCBert with every head that transformers has for it."""

    model_types = ("roc_bert",)
    test_settings = MappingProxyType(
        {
            "pronunciation_vocab_size": 30,
            "pronunciation_embed_dim": 10,
            "shape_vocab_size": 30,
            "shape_embed_dim": 11,
        }
    )

    def describe(self, config: PretrainedConfig) -> Family:
        joined = config.concat_input
        predictions = WIDE_MASKED_LM if joined else MASKED_LM
        tables = "embeddings.{word_embeddings,pronunciation_embed,shape_embed}"
        return Family(
            sizes={
                "hidden": config.hidden_size,
                "heads": config.num_attention_heads,
                "intermediate": config.intermediate_size,
            },
            layers="encoder.layer",
            stem=(
                embedding(tables, writes=None if joined else HIDDEN),
                embedding("embeddings.{position,token_type}_embeddings"),
                linear("embeddings.map_inputs_layer", writes=HIDDEN.scaled, optional=True),
                norm("embeddings.LayerNorm"),
                linear("pooler.dense", reads=HIDDEN, rows=(0, 1), optional=True),
            ),
            attention=ATTENTION,
            ffn=FFN,
            heads={
                "ForSequenceClassification": (),
                "ForMultipleChoice": (),
                "ForTokenClassification": (linear("classifier", reads=HIDDEN),),
                "ForQuestionAnswering": (linear("qa_outputs", reads=HIDDEN),),
                "ForMaskedLM": predictions,
                "ForPreTraining": predictions,
            },
        )


adapter = RoCBertAdapter()

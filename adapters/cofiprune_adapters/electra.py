"""ELECTRA (Clark et al., 2020, arXiv:2003.10555): BERT's blocks behind embeddings that may be narrower.

Where `embedding_size` is not the hidden size, the tables, their norm and the generator's head keep their width, and
the projection between them and the encoder writes the hidden dimensions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cofiprune.adapter import HIDDEN, Adapter, Family, Weights, embedding, linear, norm
from cofiprune_adapters.bert import ATTENTION, FFN

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class ElectraAdapter(Adapter):
    """ELECTRA, generator and discriminator, with every head that transformers has for it."""

    model_types = ("electra",)

    def describe(self, config: PretrainedConfig) -> Family:
        wide = config.embedding_size == config.hidden_size
        return Family(
            sizes={
                "hidden": config.hidden_size,
                "heads": config.num_attention_heads,
                "intermediate": config.intermediate_size,
            },
            layers="encoder.layer",
            stem=(
                embedding("embeddings.{word,position,token_type}_embeddings", writes=HIDDEN if wide else None),
                *((norm("embeddings.LayerNorm"),) if wide else (linear("embeddings_project", writes=HIDDEN.scaled),)),
            ),
            attention=ATTENTION,
            ffn=FFN,
            heads={
                "ForSequenceClassification": (linear("classifier.dense", reads=HIDDEN, rows=(0, 1)),),
                "ForMultipleChoice": (summary(config),),
                "ForTokenClassification": (linear("classifier", reads=HIDDEN),),
                "ForQuestionAnswering": (linear("qa_outputs", reads=HIDDEN),),
                "ForMaskedLM": generator(wide),
                "ForPreTraining": (
                    linear("discriminator_predictions.dense", reads=HIDDEN),
                    linear("discriminator_predictions.dense_prediction"),
                ),
            },
        )


def summary(config: PretrainedConfig) -> Weights:
    """What reads the hidden dimensions of the summary token: its projection, or the classifier without one."""
    projected = getattr(config, "summary_use_proj", False)
    return linear("sequence_summary.summary" if projected else "classifier", reads=HIDDEN, rows=(0, 1))


def generator(wide: bool) -> tuple[Weights, ...]:
    """The rows of the masked language modelling head, which works at the width of the embeddings."""
    if not wide:
        return (linear("generator_predictions.dense", reads=HIDDEN), linear("generator_lm_head"))
    return (
        linear("generator_predictions.dense", reads=HIDDEN, writes=HIDDEN),
        norm("generator_predictions.LayerNorm", read_by="generator_lm_head.weight"),
        linear("generator_lm_head", reads=HIDDEN),
    )


adapter = ElectraAdapter()

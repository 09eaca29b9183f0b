"""RoBERTa (Liu et al., 2019, arXiv:1907.11692), XLM-RoBERTa, CamemBERT and Data2Vec for text: BERT's blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cofiprune.adapter import HIDDEN, Adapter, ConfigSizes, Family, embedding, linear, norm
from cofiprune_adapters.bert import ATTENTION, FFN

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class RobertaAdapter(Adapter):
    """RoBERTa and the families that share its modelling code, with every head that transformers has for them."""

    model_types: tuple[str, ...] = ("roberta", "xlm-roberta", "camembert", "data2vec-text")

    def describe(self, config: PretrainedConfig) -> Family:
        return Family(
            sizes={
                "hidden": config.hidden_size,
                "heads": config.num_attention_heads,
                "intermediate": config.intermediate_size,
            },
            layers="encoder.layer",
            config=ConfigSizes(),
            stem=(
                embedding("embeddings.{word,position,token_type}_embeddings"),
                norm("embeddings.LayerNorm"),
                linear("pooler.dense", reads=HIDDEN, rows=(0, 1), optional=True),
            ),
            attention=ATTENTION,
            ffn=FFN,
            heads={
                "ForSequenceClassification": (linear("classifier.dense", reads=HIDDEN, rows=(0, 1)),),
                "ForMultipleChoice": (),
                "ForTokenClassification": (linear("classifier", reads=HIDDEN),),
                "ForQuestionAnswering": (linear("qa_outputs", reads=HIDDEN),),
                "ForMaskedLM": (
                    linear("lm_head.dense", reads=HIDDEN, writes=HIDDEN),
                    norm("lm_head.layer_norm", read_by="lm_head.decoder.weight"),
                    linear("lm_head.decoder", reads=HIDDEN),
                ),
            },
        )


adapter = RobertaAdapter()

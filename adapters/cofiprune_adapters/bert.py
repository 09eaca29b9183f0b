"""BERT (Devlin et al., 2019, arXiv:1810.04805): post-norm blocks, learned absolute positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cofiprune.adapter import (
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    Adapter,
    BlockTable,
    ConfigSizes,
    Family,
    embedding,
    linear,
    norm,
    projection,
)
from cofiprune.structure import BlockExit

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ATTENTION = BlockTable(
    rows=(
        linear("attention.self.{query,key,value}", reads=HIDDEN, writes=HEADS),
        projection("attention.output.dense", reads=HEADS),
        norm("attention.output.LayerNorm"),
    ),
    exit=BlockExit("attention", keyword="hidden_states", outputs=2),
    attributes=(
        ("attention.self", "num_attention_heads", HEADS.of(1)),
        ("attention.self", "all_head_size", HEADS),
    ),
)
FFN = BlockTable(
    rows=(
        linear("intermediate.dense", reads=HIDDEN, writes=INTERMEDIATE),
        projection("output.dense", reads=INTERMEDIATE),
        norm("output.LayerNorm"),
    ),
    exit=BlockExit("output", argument=1, keyword="input_tensor"),
    bypassed=("intermediate",),
)
MASKED_LM = (
    linear("cls.predictions.transform.dense", reads=HIDDEN, writes=HIDDEN),
    norm("cls.predictions.transform.LayerNorm", read_by="cls.predictions.decoder.weight"),
    linear("cls.predictions.decoder", reads=HIDDEN),
)


class BertAdapter(Adapter):
    """BERT with every head that transformers has for it."""

    model_types = ("bert",)

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
                "ForSequenceClassification": (),
                "ForMultipleChoice": (),
                "ForNextSentencePrediction": (),
                "ForTokenClassification": (linear("classifier", reads=HIDDEN),),
                "ForQuestionAnswering": (linear("qa_outputs", reads=HIDDEN),),
                "ForMaskedLM": MASKED_LM,
                "ForPreTraining": MASKED_LM,
            },
        )


adapter = BertAdapter()

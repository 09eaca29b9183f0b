"""ESM-2 and ESM-1b (Lin et al., 2023, doi:10.1126/science.ade2574): pre-norm blocks, rotary or learned positions.

Contact prediction reads the attention maps of every head of every layer, so that `predict_contacts` needs a model that
has all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cofiprune.adapter import (
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    Adapter,
    BlockTable,
    Family,
    embedding,
    linear,
    norm,
    projection,
)
from cofiprune.structure import BlockExit

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class EsmAdapter(Adapter):
    """ESM with every head that transformers has for it, protein folding aside."""

    model_types = ("esm",)

    def describe(self, config: PretrainedConfig) -> Family:
        return Family(
            sizes={
                "hidden": config.hidden_size,
                "heads": config.num_attention_heads,
                "intermediate": config.intermediate_size,
            },
            layers="encoder.layer",
            stem=(
                embedding("embeddings.word_embeddings"),
                embedding("embeddings.position_embeddings", optional=True),
                norm("embeddings.layer_norm", optional=True),
                norm("encoder.emb_layer_norm_after"),
                linear("pooler.dense", reads=HIDDEN, rows=(0, 1), optional=True),
                linear("contact_head.regression", rows=(0, 0)),
            ),
            attention=BlockTable(
                rows=(
                    norm("attention.LayerNorm"),
                    linear("attention.self.{query,key,value}", reads=HIDDEN, writes=HEADS),
                    projection("attention.output.dense", reads=HEADS),
                ),
                exit=BlockExit("attention"),
                attributes=(
                    ("attention.self", "num_attention_heads", HEADS.of(1)),
                    ("attention.self", "all_head_size", HEADS),
                ),
            ),
            ffn=BlockTable(
                rows=(
                    norm("LayerNorm"),
                    linear("intermediate.dense", reads=HIDDEN, writes=INTERMEDIATE),
                    projection("output.dense", reads=INTERMEDIATE),
                ),
                exit=BlockExit("output", argument=1),
                bypassed=("LayerNorm", "intermediate"),
            ),
            heads={
                "ForSequenceClassification": (linear("classifier.dense", reads=HIDDEN, rows=(0, 1)),),
                "ForTokenClassification": (linear("classifier", reads=HIDDEN),),
                "ForMaskedLM": (
                    linear("lm_head.dense", reads=HIDDEN, writes=HIDDEN),
                    norm("lm_head.layer_norm", read_by="lm_head.decoder.weight"),
                    linear("lm_head.decoder", reads=HIDDEN),
                ),
            },
        )


adapter = EsmAdapter()

"""AST (Gong et al., 2021, arXiv:2104.01778): ViT's blocks over the patches of a spectrogram."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cofiprune.adapter import HIDDEN, Adapter, Family, linear, norm
from cofiprune_adapters.vit import ATTENTION, FFN, embeddings

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class AstAdapter(Adapter):
    """The audio spectrogram transformer, bare and for classification."""

    model_types = ("audio-spectrogram-transformer",)

    def describe(self, config: PretrainedConfig) -> Family:
        return Family(
            sizes={
                "hidden": config.hidden_size,
                "heads": config.num_attention_heads,
                "intermediate": config.intermediate_size,
            },
            layers="layers",
            stem=(*embeddings("cls_token", "distillation_token", "position_embeddings", others=2), norm("layernorm")),
            attention=ATTENTION,
            ffn=FFN,
            heads={
                "ForAudioClassification": (
                    norm("classifier.layernorm"),
                    linear("classifier.dense", reads=HIDDEN, rows=(0, 1)),
                )
            },
        )


adapter = AstAdapter()

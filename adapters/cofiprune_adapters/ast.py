"""AST (Gong et al., 2021, arXiv:2104.01778): ViT's blocks over the patches of a spectrogram."""

from transformers import PretrainedConfig

from cofiprune.adapter import HIDDEN, Family, family, linear, norm
from cofiprune_adapters.vit import ATTENTION, FFN, embeddings


@family("audio-spectrogram-transformer")
def adapter(config: PretrainedConfig) -> Family:
    return Family(
        layers="layers",
        uniform=True,
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

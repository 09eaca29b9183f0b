"""DINOv2 (Oquab et al., 2024, arXiv:2304.07193), without and with registers (Darcet et al., 2024, arXiv:2309.16588).

ViT's blocks with a learned scale on each block's output (layer scale) and, in the largest models, a gated feed-forward
block. A removed block takes its layer scale along.
"""

from dataclasses import replace

from transformers import PretrainedConfig

from cofiprune.adapter import HIDDEN, INTERMEDIATE, BlockTable, Family, family, linear, norm, projection, tensor
from cofiprune_adapters.vit import ATTENTION, FFN, embeddings


@family("dinov2", "dinov2_with_registers")
def adapter(config: PretrainedConfig) -> Family:
    others = 1 + getattr(config, "num_register_tokens", 0)
    return Family(
        layers="encoder.layer",
        sizes={"intermediate": intermediate_size(config)},
        stem=(
            *embeddings("cls_token", "register_tokens", "position_embeddings", others=others),
            tensor("embeddings", "mask_token", None, HIDDEN.scaled),
            norm("layernorm"),
        ),
        attention=replace(
            ATTENTION,
            rows=(norm("norm1"), *ATTENTION.rows[1:], tensor("layer_scale1", "lambda1", HIDDEN)),
            bypassed=("norm1", "layer_scale1"),
        ),
        ffn=feed_forward(config),
        # The class token and the mean of the patches, one after the other.
        heads={"ForImageClassification": (linear("classifier", reads=HIDDEN.times(2), rows=(0, 1)),)},
    )


def intermediate_size(config: PretrainedConfig) -> int:
    """Feed-forward dimensions of a layer; a gated block has two thirds of them, up to a multiple of 8."""
    size = int(config.hidden_size * config.mlp_ratio)
    return (size * 2 // 3 + 7) // 8 * 8 if config.use_swiglu_ffn else size


def feed_forward(config: PretrainedConfig) -> BlockTable:
    """The feed-forward block, plain or gated."""
    gated = (
        linear("mlp.{gate,up}_proj", reads=HIDDEN, writes=INTERMEDIATE),
        projection("mlp.down_proj", reads=INTERMEDIATE),
    )
    inner = gated if config.use_swiglu_ffn else FFN.rows[1:]
    rows = (norm("norm2"), *inner, tensor("layer_scale2", "lambda1", HIDDEN))
    return replace(FFN, rows=rows, bypassed=("norm2", "layer_scale2"))

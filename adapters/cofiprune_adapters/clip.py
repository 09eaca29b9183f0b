"""The encoders of CLIP (Radford et al., 2021, arXiv:2103.00020), Meta CLIP 2 (Chuang et al., 2025, arXiv:2507.22062),
SigLIP (Zhai et al., 2023, arXiv:2303.15343) and SigLIP 2 (Tschannen et al., 2025, arXiv:2502.14786).

Either encoder of a pair is a model of its own with a configuration of its own, whether it was loaded alone, is a part
of a `CLIPModel` or stands in an image classifier. As a part of a `CLIPModel` its pooled output is read by what stands
behind it: leave the hidden dimensions out of `units` then.

SigLIP's image encoder pools by an attention layer of torch, which is as wide inside as at its input: slicing what it
reads would slice its heads too, so that the hidden size is refused.
"""

from dataclasses import replace

from transformers import PretrainedConfig

from cofiprune.adapter import (
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    BlockExit,
    BlockTable,
    Family,
    Weights,
    embedding,
    family,
    linear,
    norm,
    projection,
    tensor,
)

ATTENTION = BlockTable(
    rows=(
        norm("layer_norm1"),
        linear("self_attn.{q,k,v}_proj", reads=HIDDEN, writes=HEADS),
        projection("self_attn.out_proj", reads=HEADS),
    ),
    exit=BlockExit("self_attn", keyword="hidden_states", outputs=2, residual=False),
    bypassed=("layer_norm1",),
    attributes=(("self_attn", "num_heads", HEADS.of(1)),),
)
FFN = BlockTable(
    rows=(
        norm("layer_norm2"),
        linear("mlp.fc1", reads=HIDDEN, writes=INTERMEDIATE),
        projection("mlp.fc2", reads=INTERMEDIATE),
    ),
    exit=BlockExit("mlp", residual=False),
    bypassed=("layer_norm2",),
)
TEXT = (embedding("embeddings.{token,position}_embedding"), norm("final_layer_norm"))
POOLING = (
    "its pooling head is a torch.nn.MultiheadAttention, which cannot be narrower at its input than inside "
    "(vision_use_head=False does without it)"
)


def pair(
    config: PretrainedConfig, stem: tuple[Weights, ...], refused: dict[str, str] | None = None, encoder: str = ""
) -> Family:
    """The table of one encoder of a pair."""
    return Family(
        encoder=encoder,
        layers="encoder.layers",
        uniform=not refused,  # the pooling head of SigLIP is as wide as a feed-forward block
        stem=stem,
        attention=ATTENTION,
        ffn=FFN,
        heads={
            "WithProjection": (linear("{text,visual}_projection", reads=HIDDEN, rows=(0, 1), optional=True),),
            "ForImageClassification": (linear("classifier", reads=HIDDEN, rows=(0, 1)),),
        },
        refused=refused or {},
    )


def patches(*rows: Weights, others: int = 0) -> tuple[Weights, ...]:
    """The rows of the image embeddings.

    :param others: rows of the residual stream that are no patches.
    """
    return (
        linear("embeddings.patch_embedding", writes=HIDDEN.scaled, rows=(1, -others)),
        embedding("embeddings.position_embedding"),
        *rows,
    )


@family("clip_vision_model", "metaclip_2_vision_model")
def vision(config: PretrainedConfig) -> Family:
    """The image encoders of CLIP and Meta CLIP 2, without and with projection."""
    token = tensor("embeddings", "class_embedding", HIDDEN.scaled)
    # The norm behind the layers sees the pooled row only. The norm before them is spelt like this.
    rows = patches(token, norm("pre_layrnorm"), norm("post_layernorm"), others=1)
    return pair(config, rows, encoder="vision_model")


@family("clip_text_model", "metaclip_2_text_model")
def text(config: PretrainedConfig) -> Family:
    """The text encoders of CLIP and Meta CLIP 2, without and with projection."""
    return pair(config, TEXT, encoder="text_model")


@family("siglip_vision_model", "siglip2_vision_model", test_settings={"num_patches": 4})
def siglip_vision(config: PretrainedConfig) -> Family:
    """The image encoders of SigLIP and SigLIP 2, which is given its patches cut and flattened."""
    refused = {"hidden": POOLING} if getattr(config, "vision_use_head", True) else {}
    first, positions, *others = patches(norm("post_layernorm"))
    if config.model_type == "siglip2_vision_model":
        # Stretched to the size of each image, for which the embeddings read the table itself.
        positions = replace(positions, read_in="embeddings")
    return pair(config, (first, positions, *others), refused)


@family("siglip_text_model", "siglip2_text_model")
def siglip_text(config: PretrainedConfig) -> Family:
    """The text encoders of SigLIP and SigLIP 2; their head is a projection of the last row."""
    return pair(config, (*TEXT, linear("head", reads=HIDDEN, rows=(0, 1))))

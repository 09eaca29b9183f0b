"""The encoders of CLIP (Radford et al., 2021, arXiv:2103.00020) and SigLIP (Zhai et al., 2023, arXiv:2303.15343).

Either encoder of a pair is a model of its own with a configuration of its own, whether it was loaded alone or is a part
of a `CLIPModel`. Where it is a part, what stands behind it reads its pooled output: leave the hidden dimensions out of
`units` then.

SigLIP's image encoder pools by an attention layer of torch, which is as wide inside as at its input: slicing what it
reads would slice its heads too, so that the hidden size is refused.
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
    Row,
    embedding,
    linear,
    norm,
    projection,
    tensor,
)
from cofiprune.structure import Exit

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ATTENTION = BlockTable(
    rows=(
        norm("layer_norm1"),
        linear("self_attn.{q,k,v}_proj", reads=HIDDEN, writes=HEADS),
        projection("self_attn.out_proj", reads=HEADS),
    ),
    exit=Exit("self_attn", keyword="hidden_states", outputs=2, residual=False),
    skipped=("layer_norm1",),
    attributes=(("self_attn", "num_heads", HEADS.of(1)),),
)
FFN = BlockTable(
    rows=(
        norm("layer_norm2"),
        linear("mlp.fc1", reads=HIDDEN, writes=INTERMEDIATE),
        projection("mlp.fc2", reads=INTERMEDIATE),
    ),
    exit=Exit("mlp", residual=False),
    skipped=("layer_norm2",),
)
TEXT = (embedding("embeddings.{token,position}_embedding"), norm("final_layer_norm"))
POOLING = (
    "its pooling head is a torch.nn.MultiheadAttention, which cannot be narrower at its input than inside "
    "(vision_use_head=False does without it)"
)


def pair(config: PretrainedConfig, stem: tuple[Row, ...], refused: dict[str, str] | None = None) -> Family:
    """The table of one encoder of a pair."""
    return Family(
        sizes={
            "hidden": config.hidden_size,
            "heads": config.num_attention_heads,
            "intermediate": config.intermediate_size,
        },
        layers="encoder.layers",
        stem=stem,
        attention=ATTENTION,
        ffn=FFN,
        heads={"WithProjection": (linear("{text,visual}_projection", reads=HIDDEN, rows=(0, 1), optional=True),)},
        refused=refused or {},
    )


def patches(*rows: Row, others: int = 0) -> tuple[Row, ...]:
    """The rows of the image embeddings.

    :param others: rows of the residual stream that are no patches.
    """
    return (
        linear("embeddings.patch_embedding", writes=HIDDEN.scaled, rows=(1, -others)),
        embedding("embeddings.position_embedding"),
        *rows,
    )


class ClipVisionAdapter(Adapter):
    """CLIP's image encoder, without and with projection."""

    model_types = ("clip_vision_model",)

    def describe(self, config: PretrainedConfig) -> Family:
        token = tensor("embeddings", "class_embedding", HIDDEN.scaled)
        # The norm behind the layers sees the pooled row only. The norm before them is spelt like this.
        return pair(config, patches(token, norm("pre_layrnorm"), norm("post_layernorm"), others=1))


class ClipTextAdapter(Adapter):
    """CLIP's text encoder, without and with projection."""

    model_types = ("clip_text_model",)

    def describe(self, config: PretrainedConfig) -> Family:
        return pair(config, TEXT)


class SiglipVisionAdapter(Adapter):
    """SigLIP's image encoder."""

    model_types = ("siglip_vision_model",)

    def describe(self, config: PretrainedConfig) -> Family:
        refused = {"hidden": POOLING} if getattr(config, "vision_use_head", True) else {}
        return pair(config, patches(norm("post_layernorm")), refused)


class SiglipTextAdapter(Adapter):
    """SigLIP's text encoder; its head is a projection of the last row."""

    model_types = ("siglip_text_model",)

    def describe(self, config: PretrainedConfig) -> Family:
        return pair(config, (*TEXT, linear("head", reads=HIDDEN, rows=(0, 1))))


vision = ClipVisionAdapter()
text = ClipTextAdapter()
siglip_vision = SiglipVisionAdapter()
siglip_text = SiglipTextAdapter()

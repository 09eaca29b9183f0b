"""ViT (Dosovitskiy et al., 2021, arXiv:2010.11929), DeiT (Touvron et al., 2021, arXiv:2012.12877), MSN (Assran et al.,
2022, arXiv:2204.07141) and I-JEPA (Assran et al., 2023, arXiv:2301.08243): pre-norm blocks.

An image is cut into patches, each of which a convolution turns into one row of the residual stream; learned class and
position vectors are parameters of the embeddings themselves. Each block's norm stands before it and goes with it.
"""

from transformers import PretrainedConfig

from cofiprune.adapter import (
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    BlockExit,
    BlockTable,
    Family,
    Weights,
    family,
    linear,
    norm,
    projection,
    tensor,
)
from cofiprune_adapters import bert

ATTENTION = BlockTable(
    rows=(
        norm("layernorm_before"),
        linear("attention.{q,k,v}_proj", reads=HIDDEN, writes=HEADS),
        projection("attention.o_proj", reads=HEADS),
    ),
    exit=BlockExit("attention", keyword="hidden_states", outputs=2, residual=False),
    bypassed=("layernorm_before",),
    attributes=(("attention", "num_attention_heads", HEADS.of(1)),),
)
FFN = BlockTable(
    rows=(
        norm("layernorm_after"),
        linear("mlp.fc1", reads=HIDDEN, writes=INTERMEDIATE),
        projection("mlp.fc2", reads=INTERMEDIATE),
    ),
    exit=BlockExit("mlp", residual=False),
    bypassed=("layernorm_after",),
)


def embeddings(*vectors: str, others: int = 1) -> tuple[Weights, ...]:
    """The rows of the image embeddings: the patches' convolution, and the vectors by name, each [1, length, hidden].

    :param others: rows of the residual stream that are no patches, such as the class token's.
    """
    return (
        linear("embeddings.patch_embeddings.projection", writes=HIDDEN.scaled, rows=(1, -others)),
        *(tensor("embeddings", name, None, None, HIDDEN.scaled) for name in vectors),
    )


@family("vit", "deit", "vit_msn", "ijepa")
def adapter(config: PretrainedConfig) -> Family:
    others = {"deit": 2, "ijepa": 0}.get(config.model_type, 1)
    return Family(
        layers="layers",
        uniform=True,
        stem=(
            *embeddings("cls_token", "distillation_token", "mask_token", "position_embeddings", others=others),
            norm("layernorm"),
            bert.POOLER,
        ),
        attention=ATTENTION,
        ffn=FFN,
        heads={
            "ForImageClassification": (linear("classifier", reads=HIDDEN, rows=(0, 1)),),
            "ForImageClassificationWithTeacher": (linear("{cls,distillation}_classifier", reads=HIDDEN, rows=(0, 1)),),
            "ForMaskedImageModeling": (linear("decoder.0", reads=HIDDEN),),
        },
    )

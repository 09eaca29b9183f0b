"""Data2Vec for images (Baevski et al., 2022, arXiv:2202.03555): BEiT's layers, whose modules have other names."""

from transformers import PretrainedConfig

from cofiprune.adapter import (
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    BlockExit,
    BlockTable,
    Family,
    family,
    linear,
    norm,
    projection,
    tensor,
)
from cofiprune_adapters import bert
from cofiprune_adapters.beit import SHARED
from cofiprune_adapters.vit import embeddings

BIAS = "relative_position_bias"
ATTENTION = BlockTable(
    rows=(
        norm("layernorm_before"),
        linear("attention.attention.{query,key,value}", reads=HIDDEN, writes=HEADS),
        tensor(f"attention.attention.{BIAS}", f"{BIAS}_table", None, HEADS.of(1), optional=True),
        projection("attention.output.dense", reads=HEADS),
        tensor("", "lambda_1", HIDDEN),
    ),
    # The module around these two returns a tuple of one.
    exit=BlockExit("attention.output", argument=1, keyword="input_tensor", residual=False),
    bypassed=("layernorm_before", BlockExit("attention.attention", outputs=2)),
    dropped=("lambda_1",),
    attributes=bert.head_counts("attention.attention"),
)
FFN = BlockTable(
    rows=(
        norm("layernorm_after"),
        linear("intermediate.dense", reads=HIDDEN, writes=INTERMEDIATE),
        projection("output.dense", reads=INTERMEDIATE),
        tensor("", "lambda_2", HIDDEN),
    ),
    exit=BlockExit("output", residual=False),
    bypassed=("layernorm_after", "intermediate"),
    dropped=("lambda_2",),
)


@family("data2vec-vision")
def adapter(config: PretrainedConfig) -> Family:
    """Data2Vec's image encoder, bare and for classification; the head for segmentation keeps its hidden dimensions."""
    return Family(
        layers="encoder.layer",
        uniform=True,
        stem=(
            *embeddings("cls_token", "mask_token", "position_embeddings"),
            norm("layernorm", optional=True),
            norm("pooler.layernorm", optional=True),
            tensor(f"encoder.{BIAS}", f"{BIAS}_table", optional=True),
        ),
        attention=ATTENTION,
        ffn=FFN,
        heads={"ForImageClassification": (linear("classifier", reads=HIDDEN, rows=(0, 1)),)},
        refused={"head": SHARED} if config.use_shared_relative_position_bias else {},
    )

"""BEiT (Bao et al., 2022, arXiv:2106.08254): ViT's blocks with layer scale and relative position biases.

The scales are parameters of the layer itself and go with their block. Every layer has a table of biases, one column for
each head. With `use_shared_relative_position_bias` one table serves all layers, whose heads are removed one layer at a
time: heads are refused then.
"""

from dataclasses import replace

from transformers import PretrainedConfig

from cofiprune.adapter import HEADS, HIDDEN, Family, family, linear, norm, tensor
from cofiprune_adapters.vit import ATTENTION, FFN, embeddings

BIAS = "relative_position_bias"
SHARED = "one table of relative position biases (use_shared_relative_position_bias) serves the heads of all layers"


@family("beit")
def adapter(config: PretrainedConfig) -> Family:
    """BEiT with its heads for images; the heads for segmentation keep their hidden dimensions."""
    return Family(
        layers="layers",
        uniform=True,
        stem=(
            *embeddings("cls_token", "mask_token", "position_embeddings"),
            norm("layernorm"),
            norm("pooler.layernorm", optional=True),
            tensor("shared_position_bias", f"{BIAS}_table", optional=True),
        ),
        attention=replace(
            ATTENTION,
            rows=(
                *ATTENTION.rows,
                tensor("", "lambda_1", HIDDEN),
                tensor(BIAS, f"{BIAS}_table", None, HEADS.of(1), optional=True),
            ),
            dropped=("lambda_1", BIAS),
        ),
        ffn=replace(FFN, rows=(*FFN.rows, tensor("", "lambda_2", HIDDEN)), dropped=("lambda_2",)),
        heads={
            "ForImageClassification": (linear("classifier", reads=HIDDEN, rows=(0, 1)),),
            "ForMaskedImageModeling": (norm("layernorm"), linear("lm_head", reads=HIDDEN)),
        },
        refused={"head": SHARED} if config.use_shared_relative_position_bias else {},
    )

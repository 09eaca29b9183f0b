"""The encoders of T5 (Raffel et al., 2020, arXiv:1910.10683), mT5 (Xue et al., 2021, arXiv:2010.11934) and UMT5
(Chung et al., 2023, arXiv:2304.09151).

Pre-norm blocks with RMSNorm, a plain or a gated feed-forward block, and a bias for relative positions in the attention
scores. In UMT5 every layer has its own table of biases, whose columns are cut with its heads. In T5 and mT5 the first
layer's table serves all layers: it stays whole, also when the first attention block is removed, and each layer picks
the columns of the heads that it has kept.

Classes that have the decoder too (sequence classification, question answering) are refused as a whole.
"""

from transformers import PretrainedConfig

from cofiprune.adapter import (
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    BlockExit,
    BlockTable,
    ConfigSizes,
    Family,
    Shared,
    Weights,
    embedding,
    family,
    linear,
    norm,
    projection,
)

TABLE = "layer.0.SelfAttention.relative_attention_bias"
SHARED = Shared(
    "layer.0.SelfAttention",
    argument=3,
    keyword="position_bias",
    dim=1,
    output=1,
    method="compute_bias",
    table="relative_attention_bias",
)
FFN = BlockTable(
    rows=(
        norm("layer.1.layer_norm", kind="rms"),
        linear("layer.1.DenseReluDense.{wi,wi_0,wi_1}", reads=HIDDEN, writes=INTERMEDIATE, optional=True),
        projection("layer.1.DenseReluDense.wo", reads=INTERMEDIATE),
    ),
    exit=BlockExit("layer.1.DenseReluDense", residual=False),
    bypassed=("layer.1.layer_norm",),
)


@family("t5", "mt5", "umt5")
def adapter(config: PretrainedConfig) -> Family:
    """The encoders of T5, mT5 and UMT5, alone and with a token classification head."""
    shares = config.model_type != "umt5"
    own = () if shares else (Weights(TABLE, {"weight": (None, HEADS)}),)
    common = (embedding(f"encoder.block.0.{TABLE}", writes=None),) if shares else ()
    return Family(
        layers="encoder.block",
        config=ConfigSizes(heads="num_heads", intermediate="d_ff"),
        stem=(
            embedding("encoder.embed_tokens"),
            embedding("shared"),  # one with that of the encoder, which is the one that is called
            norm("encoder.final_layer_norm", kind="rms"),
            *common,
        ),
        attention=BlockTable(
            rows=(
                norm("layer.0.layer_norm", kind="rms"),
                linear("layer.0.SelfAttention.{q,k,v}", reads=HIDDEN, writes=HEADS),
                *own,
                projection("layer.0.SelfAttention.o", reads=HEADS),
            ),
            exit=BlockExit("layer.0.SelfAttention", outputs=3 if shares else 2, residual=False),
            bypassed=("layer.0.layer_norm",),
            shared=(SHARED,) if shares else (),
            attributes=(
                ("layer.0.SelfAttention", "n_heads", HEADS.of(1)),
                ("layer.0.SelfAttention", "inner_dim", HEADS),
            ),
        ),
        ffn=FFN,
        heads={"ForTokenClassification": (linear("classifier", reads=HIDDEN),)},
    )

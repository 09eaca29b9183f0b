"""The conformers of Wav2Vec2-BERT (Barrault et al., 2023, arXiv:2312.05187) and wav2vec 2.0 (Gulati et al., 2020,
arXiv:2005.08100; Wang et al., 2020, arXiv:2010.05171).

A layer is half a feed-forward block, attention, a convolution, the other half of the feed-forward block, and a norm.
The two halves are one `ffn` block: they are removed together, and one unit of `intermediate` is a dimension of either.
The convolution and the last norm stay. The convolution's channels are its own; what it reads and writes are hidden
dimensions.

With rotary positions the attention turns the hidden dimensions head by head before it projects them: the hidden size is
refused then.
"""

from collections.abc import Iterator

from transformers import PretrainedConfig

from cofiprune.adapter import (
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    BlockExit,
    BlockTable,
    ExtraTable,
    Family,
    Weights,
    family,
    linear,
    norm,
    projection,
    tensor,
)
from cofiprune_adapters.wav2vec2 import features

FFN = BlockTable(
    rows=(
        norm("ffn{1,2}_layer_norm"),
        linear("ffn{1,2}.intermediate_dense", reads=HIDDEN, writes=INTERMEDIATE),
        projection("ffn{1,2}.output_dense", reads=INTERMEDIATE),
    ),
    exit=BlockExit("ffn2", residual=False),
    bypassed=("ffn1_layer_norm", BlockExit("ffn1", residual=False), "ffn2_layer_norm"),
)
REST = ExtraTable(
    rows=(
        norm("conv_module.layer_norm"),
        linear("conv_module.pointwise_conv1", reads=HIDDEN),
        linear("conv_module.depthwise_conv"),
        linear("conv_module.pointwise_conv2", writes=HIDDEN.scaled),
        norm("final_layer_norm"),
    ),
    exits=(BlockExit("conv_module", residual=False), "final_layer_norm"),
)
TURNED = "rotary positions turn the hidden dimensions head by head (position_embeddings_type='rotary')"


@family("wav2vec2-bert", "wav2vec2-conformer")
def adapter(config: PretrainedConfig) -> Family:
    sound = config.model_type != "wav2vec2-bert"
    return Family(
        layers="encoder.layers",
        stem=(
            *(features(config) if sound else ()),
            linear("feature_projection.projection", writes=HIDDEN.scaled),
            tensor("", "masked_spec_embed", HIDDEN.scaled),
            norm("encoder.layer_norm", optional=True),
            *unused(sound),
            *behind(config),
        ),
        attention=attention(config),
        ffn=FFN,
        extra=REST,
        heads={
            "ForCTC": (linear("lm_head", reads=None if config.add_adapter else HIDDEN),),
            "ForSequenceClassification": (linear("projector", reads=HIDDEN),),
            "ForAudioFrameClassification": (linear("classifier", reads=HIDDEN),),
            "ForXVector": (linear("projector", reads=HIDDEN),),
            **({"ForPreTraining": (linear("project_hid", reads=HIDDEN),)} if sound else {}),
        },
        refused={"hidden": TURNED} if config.position_embeddings_type == "rotary" else {},
    )


def attention(config: PretrainedConfig) -> BlockTable:
    """The attention block; positions come as sinusoids, as embeddings of distances, or not at all."""
    return BlockTable(
        rows=(
            norm("self_attn_layer_norm"),
            linear("self_attn.linear_{q,k,v}", reads=HIDDEN, writes=HEADS),
            # Applied to the 2 * T - 1 distances of T tokens, as wide as the hidden size ever was.
            linear("self_attn.linear_pos", writes=HEADS, rows=(2, -1), optional=True),
            Weights("self_attn.distance_embedding", {"weight": ()}, optional=True),
            tensor("self_attn", "pos_bias_u", HEADS.of(1)),
            tensor("self_attn", "pos_bias_v", HEADS.of(1)),
            projection("self_attn.linear_out", reads=HEADS),
        ),
        exit=BlockExit("self_attn", keyword="hidden_states", outputs=2, residual=False),
        bypassed=("self_attn_layer_norm",),
        # A product of each query with the 2 * T - 1 distances, or with the distance of every pair.
        pairwise={"relative": 2, "relative_key": 1}.get(config.position_embeddings_type, 0),
        per_token={"relative": -1}.get(config.position_embeddings_type, 0),
    )


def unused(sound: bool) -> Iterator[Weights]:
    """The convolution for positions of wav2vec 2.0, which the conformer has and does not run."""
    if sound:
        yield linear("encoder.pos_conv_embed.conv", rows=(0, 0))
        yield Weights("encoder.pos_conv_embed.conv.parametrizations.weight", {"original0": (), "original1": ()})


def behind(config: PretrainedConfig) -> Iterator[Weights]:
    """The modules that may follow the layers: half a feed-forward block, and convolutions that shorten the sequence.

    Their first layer alone reads hidden dimensions, after a projection to another width if there is one.
    """
    yield linear("intermediate_ffn.intermediate_dense", reads=HIDDEN, optional=True)
    yield linear("intermediate_ffn.output_dense", writes=HIDDEN.scaled, optional=True)
    if not config.add_adapter:
        return
    if config.output_hidden_size != config.hidden_size:
        yield linear("adapter.proj", reads=HIDDEN)
        return
    yield norm("adapter.layers.0.{residual,self_attn}_layer_norm", optional=True)
    yield linear("adapter.layers.0.{residual_conv,self_attn_conv,conv}", reads=HIDDEN, optional=True)

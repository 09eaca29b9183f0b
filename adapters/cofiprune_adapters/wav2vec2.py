"""wav2vec 2.0 (Baevski et al., 2020, arXiv:2006.11477) and the families that kept its encoder: HuBERT (Hsu et al.,
2021, arXiv:2106.07447), data2vec for audio (Baevski et al., 2022, arXiv:2202.03555), UniSpeech (Wang et al., 2021,
arXiv:2101.07597), UniSpeech-SAT (Chen et al., 2021, arXiv:2110.05752) and SEW (Wu et al., 2021, arXiv:2109.06870),
whose layers run on a shortened sequence.

The relative positions come from a convolution over the hidden dimensions whose channels are grouped: a hidden dimension
belongs to a group and cannot leave it alone, so that the hidden size is refused.

The base models have post-norm layers, in which the norms follow attention and feed-forward; the large ones
(`do_stable_layer_norm`) have pre-norm layers. A language adapter of an MMS model (`adapter_attn_dim`) stays as it is.
Multiply-accumulates of SEW are exact where its `squeeze_factor` divides the rows that its convolutions make.
"""

from collections.abc import Iterator
from dataclasses import replace

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
)

PRE_NORM_ATTENTION = BlockTable(
    rows=(
        linear("attention.{q,k,v}_proj", reads=HIDDEN, writes=HEADS),
        projection("attention.out_proj", reads=HEADS),
        norm("layer_norm"),
    ),
    exit=BlockExit("attention", keyword="hidden_states", outputs=2, residual=False),
    bypassed=("layer_norm",),
    attributes=(("attention", "num_heads", HEADS.of(1)),),
)
PRE_NORM_FFN = BlockTable(
    rows=(
        linear("feed_forward.intermediate_dense", reads=HIDDEN, writes=INTERMEDIATE),
        projection("feed_forward.output_dense", reads=INTERMEDIATE),
        norm("final_layer_norm"),
    ),
    exit=BlockExit("feed_forward", residual=False),
    bypassed=("final_layer_norm",),
)
# The norm behind the residual is where the block leaves; what stands before it gives zeros.
ATTENTION = replace(PRE_NORM_ATTENTION, exit=BlockExit("layer_norm"), bypassed=(PRE_NORM_ATTENTION.exit,))
FFN = replace(PRE_NORM_FFN, exit=BlockExit("final_layer_norm"), bypassed=(PRE_NORM_FFN.exit,))
LANGUAGE = ExtraTable(rows=(linear("adapter_layer.linear_{1,2}"),), exits=(BlockExit("adapter_layer", residual=False),))
GROUPED = (
    "the convolution that gives it positions is grouped over the hidden dimensions (num_conv_pos_embedding_groups)"
)


@family("wav2vec2", "hubert", "data2vec-audio", "unispeech", "unispeech-sat", "sew")
def adapter(config: PretrainedConfig) -> Family:
    factor = getattr(config, "squeeze_factor", 1)
    language = getattr(config, "adapter_attn_dim", None) is not None
    stable = getattr(config, "do_stable_layer_norm", False)
    return Family(
        layers="encoder.layers",
        uniform=True,
        stem=(
            *features(config, factor),
            linear("feature_projection{,.projection}", rows=(factor, 0), optional=True),
            *positions(config),
            linear("encoder.upsample.projection", optional=True),
        ),
        extra=LANGUAGE if stable and language else ExtraTable(),
        attention=PRE_NORM_ATTENTION if stable else ATTENTION,
        ffn=PRE_NORM_FFN if stable else FFN,
        heads={
            "ForCTC": (linear("lm_head"),),
            "ForSequenceClassification": (linear("projector"),),
            "ForAudioFrameClassification": (linear("classifier"),),
            "ForXVector": (linear("projector"),),
        },
        refused={"hidden": GROUPED},
    )


def features(config: PretrainedConfig, per_row: int = 1) -> Iterator[Weights]:
    """The convolutions over the sound wave, with the number of rows that each makes for the layers' T.

    :param per_row: how many of theirs become one row of the layers.
    """
    more = 0
    for index in reversed(range(len(config.conv_dim))):
        yield linear(f"feature_extractor.conv_layers.{index}.conv", rows=(per_row, more))
        stride, kernel = config.conv_stride[index], config.conv_kernel[index]
        per_row, more = stride * per_row, stride * more + kernel - stride


def positions(config: PretrainedConfig) -> Iterator[Weights]:
    """The grouped convolutions, one or several after one another; an even kernel makes T + 1 rows."""
    path = "encoder.pos_conv_embed"
    if config.model_type == "data2vec-audio":
        for index in range(config.num_conv_pos_embeddings):
            yield linear(f"{path}.layers.{index}.conv", rows=(1, 1 - config.conv_pos_kernel_size % 2))
        return
    rows = (1, 1 - config.num_conv_pos_embeddings % 2)
    yield linear(f"{path}.conv", rows=rows)
    # Where its weight is normalised, a magnitude and a direction take its place.
    yield Weights(f"{path}.conv.parametrizations.weight", {"original0": ()}, optional=True)
    yield Weights(f"{path}.conv.parametrizations.weight", {"original1": ()}, rows=rows, optional=True)

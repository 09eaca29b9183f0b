"""The encoder of Whisper (Radford et al., 2022, arXiv:2212.04356), alone or under a head for classification.

The feed-forward matrices lie in the layer itself; the second is where their block leaves. When transformers loads a
model, it computes the sinusoids of its positions before it reads those in the file, and fails where the hidden size is
odd: the hidden size is refused.
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
    embedding,
    family,
    linear,
    norm,
    projection,
)

ATTENTION = BlockTable(
    rows=(
        norm("self_attn_layer_norm"),
        linear("self_attn.{q,k,v}_proj", reads=HIDDEN, writes=HEADS),
        projection("self_attn.out_proj", reads=HEADS),
    ),
    exit=BlockExit("self_attn", keyword="hidden_states", outputs=2, residual=False),
    bypassed=("self_attn_layer_norm",),
    attributes=(("self_attn", "num_heads", HEADS.of(1)),),
)
FFN = BlockTable(
    rows=(
        norm("final_layer_norm"),
        linear("fc1", reads=HIDDEN, writes=INTERMEDIATE),
        projection("fc2", reads=INTERMEDIATE),
    ),
    exit=BlockExit("fc2", residual=False),
    bypassed=("final_layer_norm", "fc1"),
)
SINUSOIDS = "transformers cannot load it with an odd number of them, for which its positions have no sinusoids"


@family("whisper")
def adapter(config: PretrainedConfig) -> Family:
    return Family(
        encoder="encoder",
        layers="layers",
        config=ConfigSizes(
            layers="encoder_layers", hidden="d_model", heads="encoder_attention_heads", intermediate="encoder_ffn_dim"
        ),
        uniform=True,
        # The first convolution makes two rows of what the second makes one.
        stem=(linear("conv1", rows=(2, 0)), linear("conv2"), embedding("embed_positions"), norm("layer_norm")),
        attention=ATTENTION,
        ffn=FFN,
        heads={"ForAudioClassification": (linear("projector", reads=HIDDEN),)},
        refused={"hidden": SINUSOIDS},
    )

"""WavLM (Chen et al., 2022, arXiv:2110.13900): wav2vec 2.0's layers with a gated bias for relative positions.

The first layer makes the bias from its table and every layer hands it on; without its first attention block a model
keeps that table. In every layer a gate reads the hidden dimensions head by head. Query, key, value and output
projections are not called: their weights go to torch's `multi_head_attention_forward`, which is as wide inside as at
its input, so that heads are refused. The hidden size is refused as in wav2vec 2.0.
"""

from dataclasses import replace

from transformers import PretrainedConfig

from cofiprune.adapter import (
    HEADS,
    BlockExit,
    BlockTable,
    Family,
    Shared,
    embedding,
    family,
    linear,
    projection,
    tensor,
)
from cofiprune_adapters import wav2vec2

NARROW = "its attention is torch's multi_head_attention_forward, which cannot be narrower inside than at its input"
SHARED = Shared(
    "attention",
    argument=2,
    keyword="position_bias",
    dim=0,
    output=2,
    method="compute_bias",
    table="rel_attn_embed",
    repeated=True,
)


@family("wavlm")
def adapter(config: PretrainedConfig) -> Family:
    plain = wav2vec2.adapter.describe(config)
    table = embedding("encoder.layers.0.attention.rel_attn_embed", writes=None)
    return replace(
        plain,
        uniform=False,  # the first layer has a table that the others do not
        stem=(*plain.stem, table),
        attention=attention(config, plain.attention),
        refused={**plain.refused, "head": NARROW},
    )


def attention(config: PretrainedConfig, plain: BlockTable) -> BlockTable:
    """wav2vec 2.0's attention block with a gate on the bias, and another way out of the module."""
    own = BlockExit("attention", outputs=3, residual=False)
    rows = (
        linear("attention.{q,k,v}_proj"),
        tensor("attention", "gru_rel_pos_const", None, HEADS.of(1)),
        linear("attention.gru_rel_pos_linear", rows=(config.num_attention_heads, 0)),
        projection("attention.out_proj", reads=HEADS, read_in="attention"),
        *plain.rows[2:],
    )
    leaves = {"exit": own} if plain.exit == wav2vec2.PRE_NORM_ATTENTION.exit else {"bypassed": (own,)}
    return replace(plain, rows=rows, shared=(SHARED,), attributes=(), **leaves)

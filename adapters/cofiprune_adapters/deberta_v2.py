"""DeBERTa-v2 and v3 (He et al., 2023, arXiv:2111.09543): DeBERTa with separate projections and a convolution.

Beyond DeBERTa: relative positions fall into buckets, their table may be normalised (`norm_rel_ebd`) and may be
projected by the query and key projections of the tokens themselves (`share_att_key`), which then leave out what is
removed of the table.

The convolution parallel to the first layer reads and writes the hidden dimensions. An activation follows it, so that
a fractional mask cannot scale what it writes: it is sliced only, and the norm behind it scales. With `conv_groups`
above 1 a hidden dimension belongs to a group of channels, so that the hidden size is refused.
"""

from dataclasses import replace

from transformers import PretrainedConfig

from cofiprune.adapter import HEADS, HIDDEN, Family, Weights, family, linear, norm, projection
from cofiprune_adapters import bert
from cofiprune_adapters.deberta import POSITIONS, embeddings, masked_lm, position_terms


@family("deberta-v2")
def adapter(config: PretrainedConfig) -> Family:
    grouped = getattr(config, "conv_kernel_size", 0) > 0 and getattr(config, "conv_groups", 1) > 1
    pooler = (linear("pooler.dense", reads=HIDDEN, rows=(0, 1)),)
    return Family(
        layers="encoder.layer",
        uniform=not getattr(config, "conv_kernel_size", 0),
        stem=(
            *embeddings(config),
            POSITIONS,
            norm("encoder.LayerNorm", optional=True),
            linear("encoder.conv.conv", reads=HIDDEN, writes=HIDDEN, optional=True),
            norm("encoder.conv.LayerNorm", optional=True),
        ),
        attention=replace(
            bert.ATTENTION,
            rows=(
                *scores(config),
                linear("attention.self.value_proj", reads=HIDDEN, writes=HEADS),
                projection("attention.output.dense", reads=HEADS),
                norm("attention.output.LayerNorm"),
            ),
            # Each term is a product of every token with all relative positions.
            per_token=positions(config) * len(position_terms(config)),
        ),
        ffn=bert.FFN,
        heads={
            "ForSequenceClassification": pooler,
            "ForMultipleChoice": pooler,
            **bert.TOKEN_HEADS,
            "ForMaskedLM": masked_lm(config),
        },
        refused={"hidden": "its convolution is grouped (conv_groups > 1)"} if grouped else {},
    )


def scores(config: PretrainedConfig) -> tuple[Weights, ...]:
    """The projections behind the attention scores: of the tokens, and of the relative positions."""
    if getattr(config, "share_att_key", False):
        both = (1, positions(config))
        return (linear("attention.self.{query,key}_proj", reads=HIDDEN.zeroed, writes=HEADS, rows=both),)
    return (
        linear("attention.self.{query,key}_proj", reads=HIDDEN, writes=HEADS),
        linear(
            "attention.self.pos_{key,query}_proj",
            reads=HIDDEN.zeroed,
            writes=HEADS,
            rows=(0, positions(config)),
            optional=True,
        ),
    )


def positions(config: PretrainedConfig) -> int:
    """Number of rows of the table of relative positions; 0 without one."""
    if not config.relative_attention:
        return 0
    span: int = getattr(config, "position_buckets", -1)
    if span < 1:
        span = config.max_relative_positions
    if span < 1:
        span = config.max_position_embeddings
    return 2 * span

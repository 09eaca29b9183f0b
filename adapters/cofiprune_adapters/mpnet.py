"""MPNet (Song et al., 2020, arXiv:2004.09297): BERT's blocks with a bias for relative positions in the scores.

The bias has one table with a column for each head, and every layer adds it to its scores. A compacted layer picks the
columns of the heads that it has kept; the table itself stays whole, since other layers keep other heads.
"""

from dataclasses import replace

from transformers import PretrainedConfig

from cofiprune.adapter import (
    HEADS,
    HIDDEN,
    BlockExit,
    BlockTable,
    Family,
    Shared,
    embedding,
    family,
    linear,
    norm,
    projection,
)
from cofiprune_adapters import bert, roberta

ATTENTION = BlockTable(
    rows=(
        linear("attention.attn.{q,k,v}", reads=HIDDEN, writes=HEADS),
        projection("attention.attn.o", reads=HEADS),
        norm("attention.LayerNorm"),
    ),
    exit=BlockExit("attention", keyword="hidden_states", outputs=2),
    shared=(Shared("attention.attn", argument=2, keyword="position_bias", dim=1),),
    attributes=bert.head_counts("attention.attn"),
)


@family("mpnet")
def adapter(config: PretrainedConfig) -> Family:
    stem = (
        embedding("embeddings.{word,position}_embeddings"),
        norm("embeddings.LayerNorm"),
        embedding("encoder.relative_attention_bias", writes=None),
        bert.POOLER,
    )
    return replace(roberta.adapter.describe(config), stem=stem, attention=ATTENTION)

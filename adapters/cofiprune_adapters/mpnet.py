"""MPNet (Song et al., 2020, arXiv:2004.09297): BERT's blocks with a bias for relative positions in the scores.

The bias has one table with a column for each head, and every layer adds it to its scores. A compacted layer picks the
columns of the heads that it has kept; the table itself stays whole, since other layers keep other heads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cofiprune.adapter import HEADS, HIDDEN, BlockTable, Family, embedding, linear, norm, projection
from cofiprune.structure import BlockExit, Shared
from cofiprune_adapters.roberta import RobertaAdapter

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ATTENTION = BlockTable(
    rows=(
        linear("attention.attn.{q,k,v}", reads=HIDDEN, writes=HEADS),
        projection("attention.attn.o", reads=HEADS),
        norm("attention.LayerNorm"),
    ),
    exit=BlockExit("attention", keyword="hidden_states", outputs=2),
    shared=(Shared("attention.attn", argument=2, keyword="position_bias", dim=1),),
    attributes=(
        ("attention.attn", "num_attention_heads", HEADS.of(1)),
        ("attention.attn", "all_head_size", HEADS),
    ),
)


class MPNetAdapter(RobertaAdapter):
    """MPNet with every head that transformers has for it."""

    model_types = ("mpnet",)

    def describe(self, config: PretrainedConfig) -> Family:
        stem = (
            embedding("embeddings.{word,position}_embeddings"),
            norm("embeddings.LayerNorm"),
            embedding("encoder.relative_attention_bias", writes=None),
            linear("pooler.dense", reads=HIDDEN, rows=(0, 1), optional=True),
        )
        return replace(super().describe(config), stem=stem, attention=ATTENTION)


adapter = MPNetAdapter()

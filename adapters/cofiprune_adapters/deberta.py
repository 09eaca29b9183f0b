"""DeBERTa v1 (He et al., 2021, arXiv:2006.03654): BERT's blocks with disentangled attention to relative positions.

The relative positions have a table of their own, whose weight the encoder reads directly and every layer
projects. It is sliced along the hidden dimension but never scaled, since it is not written to the residual
stream; the position projections leave out what is removed of it.

Query, key and value are one projection in which the rows of a head lie together, so that a head is a single run
of 3 * head_dim rows. `talking_head` mixes the heads with one another, which no slice undoes: heads are refused then.

Multiply-accumulates are exact for sequences of up to `max_relative_positions` tokens, and an upper bound beyond, where
the range of relative positions stops growing. The mixing of `talking_head` is not counted.
"""

from dataclasses import replace

from transformers import PretrainedConfig

from cofiprune.adapter import (
    HEADS,
    HIDDEN,
    Family,
    Weights,
    embedding,
    family,
    linear,
    norm,
    projection,
    tensor,
)
from cofiprune_adapters import bert

POSITIONS = Weights("encoder.rel_embeddings", {"weight": (None, HIDDEN)}, table=True, optional=True)
"""The table of relative positions [2 * span, hidden]."""


@family("deberta")
def adapter(config: PretrainedConfig) -> Family:
    talking = getattr(config, "talking_head", False)
    return Family(
        layers="encoder.layer",
        uniform=True,
        stem=(*embeddings(config), POSITIONS),
        attention=replace(
            bert.ATTENTION,
            rows=(
                linear("attention.self.in_proj", reads=HIDDEN, writes=HEADS),
                tensor("attention.self", "q_bias", HEADS),
                tensor("attention.self", "v_bias", HEADS),
                # Applied to the 2 * T relative positions of T tokens.
                linear(
                    "attention.self.{pos_proj,pos_q_proj}",
                    reads=HIDDEN.zeroed,
                    writes=HEADS,
                    rows=(2, 0),
                    optional=True,
                ),
                linear("attention.self.{head_logits_proj,head_weights_proj}", rows=(0, 0), optional=True),
                projection("attention.output.dense", reads=HEADS),
                norm("attention.output.LayerNorm"),
            ),
            # Each term is a product of T tokens with 2 * T relative positions.
            pairwise=2 * len(position_terms(config)),
        ),
        ffn=bert.FFN,
        heads={
            "ForSequenceClassification": (linear("pooler.dense", reads=HIDDEN, rows=(0, 1)),),
            **bert.TOKEN_HEADS,
            "ForMaskedLM": masked_lm(config),
        },
        refused={"head": "talking_head mixes the scores of its heads with one another"} if talking else {},
    )


def embeddings(config: PretrainedConfig) -> tuple[Weights, ...]:
    """The rows of the token embeddings: as wide as the hidden size, or narrower and then projected to it.

    Position and token-type tables are there or not as the configuration says.
    """
    narrow = width(config) != config.hidden_size
    writes = None if narrow else HIDDEN
    return (
        embedding("embeddings.word_embeddings", writes=writes),
        embedding("embeddings.{position,token_type}_embeddings", writes=writes, optional=True),
        *((linear("embeddings.embed_proj", writes=HIDDEN.scaled),) if narrow else ()),
        norm("embeddings.LayerNorm"),
    )


def masked_lm(config: PretrainedConfig) -> tuple[Weights, ...]:
    """The rows of the masked language modelling head, which comes in two forms."""
    if not config.legacy:
        # It has no decoder and multiplies with the embedding table itself.
        table = "deberta.embeddings.word_embeddings"
        return (
            linear("lm_predictions.lm_head.dense", reads=HIDDEN, writes=HIDDEN),
            norm("lm_predictions.lm_head.LayerNorm", read_by=f"{table}.weight"),
            linear(table, reads=HIDDEN),
        )
    return bert.MASKED_LM if width(config) == config.hidden_size else bert.NARROW_MASKED_LM


def width(config: PretrainedConfig) -> int:
    """Width of the token embeddings."""
    size: int = getattr(config, "embedding_size", config.hidden_size)
    return size


def position_terms(config: PretrainedConfig) -> tuple[str, ...]:
    """The terms, of "c2p" (content to position) and "p2c" (position to content), that attention adds to its scores."""
    terms = config.pos_att_type or ()
    return tuple(term for term in ("c2p", "p2c") if config.relative_attention and term in terms)

"""Encoders of rotary attention (`q_proj` to `o_proj`) and, most of them, a gated feed-forward block.

Nomic-BERT (Nussbaum et al., 2024, arXiv:2402.01613), GTE v1.5 (Zhang et al., 2024, arXiv:2407.19669) and
jina-embeddings-v3 (Sturua et al., 2024, arXiv:2409.10173), whose feed-forward block is plain, are post-norm: the layer
adds the residual and hands the sum to the norm. EuroBERT (Boizard et al., 2025, arXiv:2503.05500) is pre-norm
with RMSNorm and shares keys and values among several query heads: one unit of `heads` is such a group of query heads
with the keys and values that it reads.
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
    Weights,
    embedding,
    family,
    linear,
    norm,
    projection,
)
from cofiprune_adapters import bert

ATTENTION = (
    linear("self_attn.{q,k,v}_proj", reads=HIDDEN, writes=HEADS),
    projection("self_attn.o_proj", reads=HEADS),
)
FFN = (
    linear("mlp.{gate,up}_proj", reads=HIDDEN, writes=INTERMEDIATE),
    projection("mlp.down_proj", reads=INTERMEDIATE),
)
PLAIN_FFN = (
    linear("mlp.fc1", reads=HIDDEN, writes=INTERMEDIATE),
    projection("mlp.fc2", reads=INTERMEDIATE),
)
PREDICTIONS = {
    "nomic_bert": ("cls.predictions.transform", "cls.predictions.decoder"),
    "gte": ("lm_head", "lm_head.decoder"),
    "jina_embeddings_v3": ("lm_head", "lm_head.decoder"),
}
"""Paths of the transform and the decoder of the masked language modelling head."""


@family("nomic_bert", "gte", "jina_embeddings_v3")
def post_norm(config: PretrainedConfig) -> Family:
    ffn = PLAIN_FFN if config.model_type == "jina_embeddings_v3" else FFN
    return Family(
        layers="layers",
        config=ConfigSizes(head_dim="head_dim" if hasattr(config, "head_dim") else None),
        uniform=True,
        stem=(
            embedding("embeddings.word_embeddings"),
            embedding("embeddings.token_type_embeddings", optional=True),
            norm("embeddings.LayerNorm"),
            bert.POOLER,
        ),
        attention=BlockTable(
            rows=(*ATTENTION, norm("post_attention_layernorm")),
            exit=BlockExit("post_attention_layernorm"),
            bypassed=(BlockExit("self_attn", outputs=2, residual=False),),
        ),
        ffn=BlockTable(
            rows=(*ffn, norm("post_mlp_layernorm")),
            exit=BlockExit("post_mlp_layernorm"),
            bypassed=(BlockExit("mlp", residual=False),),
        ),
        heads={
            "ForSequenceClassification": (linear("classifier.dense", reads=HIDDEN, rows=(0, 1), optional=True),),
            **bert.TOKEN_HEADS,
            "ForMaskedLM": masked_lm(*PREDICTIONS[config.model_type]),
        },
    )


def masked_lm(transform: str, decoder: str) -> tuple[Weights, ...]:
    """The rows of a masked language modelling head: a dense transform with a norm, and a decoder."""
    return (
        linear(f"{transform}.dense", reads=HIDDEN, writes=HIDDEN),
        norm(f"{transform}.layer_norm", read_by=f"{decoder}.weight"),
        linear(decoder, reads=HIDDEN),
    )


@family("eurobert")
def eurobert(config: PretrainedConfig) -> Family:
    rows = (1, 0) if config.classifier_pooling == "late" else (0, 1)
    return Family(
        layers="layers",
        config=ConfigSizes(heads="num_key_value_heads"),
        uniform=True,
        stem=(embedding("embed_tokens"), norm("norm", kind="rms", read_by="lm_head.weight")),
        attention=BlockTable(
            rows=(norm("input_layernorm", kind="rms"), *ATTENTION),
            exit=BlockExit("self_attn", keyword="hidden_states", outputs=2, residual=False),
            bypassed=("input_layernorm",),
        ),
        ffn=BlockTable(
            rows=(norm("post_attention_layernorm", kind="rms"), *FFN),
            exit=BlockExit("mlp", residual=False),
            bypassed=("post_attention_layernorm",),
        ),
        heads={
            "ForSequenceClassification": (
                linear("dense", reads=HIDDEN, rows=rows),
                linear("classifier", rows=rows),
            ),
            "ForTokenClassification": (linear("classifier", reads=HIDDEN),),
            "ForMaskedLM": (linear("lm_head", reads=HIDDEN),),
        },
    )

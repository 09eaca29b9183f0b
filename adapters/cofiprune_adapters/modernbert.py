"""ModernBERT (Warner et al., 2024, arXiv:2412.13663): pre-norm blocks, rotary positions, gated feed-forward.

Query, key and value are one fused projection, and so are the two halves of the gated feed-forward block. The first
attention block has no norm of its own, since the embeddings end in one.

Multiply-accumulates of the layers with local attention are exact for sequences within the window and an upper bound
beyond.
"""

from transformers import PretrainedConfig

from cofiprune.adapter import (
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    BlockExit,
    BlockTable,
    Family,
    Weights,
    embedding,
    family,
    linear,
    norm,
    projection,
)


@family("modernbert")
def adapter(config: PretrainedConfig) -> Family:
    return Family(
        layers="layers",
        stem=(embedding("embeddings.tok_embeddings"), norm("embeddings.norm"), norm("final_norm")),
        attention=BlockTable(
            rows=(
                norm("attn_norm"),
                linear("attn.Wqkv", reads=HIDDEN, writes=HEADS.times(3)),
                projection("attn.Wo", reads=HEADS),
            ),
            exit=BlockExit("attn", outputs=2, residual=False),
            bypassed=("attn_norm",),
        ),
        ffn=BlockTable(
            rows=(
                norm("mlp_norm"),
                linear("mlp.Wi", reads=HIDDEN, writes=INTERMEDIATE.times(2)),
                projection("mlp.Wo", reads=INTERMEDIATE),
            ),
            exit=BlockExit("mlp", residual=False),
            bypassed=("mlp_norm",),
        ),
        heads={
            "ForSequenceClassification": classifier(pooled=True),
            "ForMultipleChoice": classifier(pooled=True),
            "ForTokenClassification": classifier(pooled=False),
            "ForQuestionAnswering": classifier(pooled=False),
            "ForMaskedLM": (
                linear("head.dense", reads=HIDDEN, writes=HIDDEN),
                norm("head.norm", read_by="decoder.weight"),
                linear("decoder", reads=HIDDEN),
            ),
        },
    )


def classifier(*, pooled: bool) -> tuple[Weights, ...]:
    """The rows of a prediction head and its classifier, applied to one vector per example or to every token."""
    rows = (0, 1) if pooled else (1, 0)
    return (
        linear("head.dense", reads=HIDDEN, writes=HIDDEN, rows=rows),
        norm("head.norm"),
        linear("classifier", reads=HIDDEN, rows=rows),
    )

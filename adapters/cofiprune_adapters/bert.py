"""BERT (Devlin et al., 2019, arXiv:1810.04805): post-norm blocks, learned absolute positions."""

from dataclasses import replace

from transformers import PretrainedConfig

from cofiprune.adapter import (
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    Axis,
    BlockExit,
    BlockTable,
    Family,
    embedding,
    family,
    linear,
    norm,
    projection,
)


def head_counts(module: str) -> tuple[tuple[str, str, Axis], ...]:
    """The integers that an attention module of BERT keeps about its size."""
    return ((module, "num_attention_heads", HEADS.of(1)), (module, "all_head_size", HEADS))


ATTENTION = BlockTable(
    rows=(
        linear("attention.self.{query,key,value}", reads=HIDDEN, writes=HEADS),
        projection("attention.output.dense", reads=HEADS),
        norm("attention.output.LayerNorm"),
    ),
    exit=BlockExit("attention", keyword="hidden_states", outputs=2),
    attributes=head_counts("attention.self"),
)
FFN = BlockTable(
    rows=(
        linear("intermediate.dense", reads=HIDDEN, writes=INTERMEDIATE),
        projection("output.dense", reads=INTERMEDIATE),
        norm("output.LayerNorm"),
    ),
    exit=BlockExit("output", argument=1, keyword="input_tensor"),
    bypassed=("intermediate",),
)
TABLES = embedding("embeddings.{word,position,token_type}_embeddings")
POOLER = linear("pooler.dense", reads=HIDDEN, rows=(0, 1), optional=True)
TOKEN_HEADS = {
    "ForTokenClassification": (linear("classifier", reads=HIDDEN),),
    "ForQuestionAnswering": (linear("qa_outputs", reads=HIDDEN),),
}
MASKED_LM = (
    linear("cls.predictions.transform.dense", reads=HIDDEN, writes=HIDDEN),
    norm("cls.predictions.transform.LayerNorm", read_by="cls.predictions.decoder.weight"),
    linear("cls.predictions.decoder", reads=HIDDEN),
)
NARROW_MASKED_LM = (linear("cls.predictions.transform.dense", reads=HIDDEN), linear("cls.predictions.decoder"))
"""The same where the decoder is narrower than the hidden size."""


@family("bert")
def adapter(config: PretrainedConfig) -> Family:
    return Family(
        layers="encoder.layer",
        uniform=True,
        stem=(TABLES, norm("embeddings.LayerNorm"), POOLER),
        attention=ATTENTION,
        ffn=FFN,
        heads={
            "ForSequenceClassification": (),
            "ForMultipleChoice": (),
            "ForNextSentencePrediction": (),
            **TOKEN_HEADS,
            "ForMaskedLM": MASKED_LM,
            "ForPreTraining": MASKED_LM,
        },
    )


def pre_norm(attention: str, ffn: str) -> tuple[BlockTable, BlockTable]:
    """The tables of BERT's blocks with a norm before each instead of behind it.

    :param attention: path of the norm in the attention module, which runs it.
    :param ffn: path of the norm before the feed-forward block.
    """
    return (
        replace(ATTENTION, rows=(norm(attention), *ATTENTION.rows[:2])),
        replace(FFN, rows=(norm(ffn), *FFN.rows[:2]), bypassed=(ffn, "intermediate")),
    )

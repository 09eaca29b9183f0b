"""ELECTRA (Clark et al., 2020, arXiv:2003.10555), generator and discriminator: BERT's blocks, narrower embeddings.

Where `embedding_size` is not the hidden size, the tables, their norm and the generator's head keep their width, and
the projection between them and the encoder writes the hidden dimensions.
"""

from transformers import PretrainedConfig

from cofiprune.adapter import HIDDEN, Family, Weights, embedding, family, linear, norm
from cofiprune_adapters import bert, roberta


@family("electra")
def adapter(config: PretrainedConfig) -> Family:
    wide = config.embedding_size == config.hidden_size
    return Family(
        layers="encoder.layer",
        uniform=True,
        stem=narrow_stem("embeddings.{word,position,token_type}_embeddings", wide=wide),
        attention=bert.ATTENTION,
        ffn=bert.FFN,
        heads={
            "ForSequenceClassification": roberta.CLASSIFIER,
            "ForMultipleChoice": (summary(config),),
            **bert.TOKEN_HEADS,
            "ForMaskedLM": generator(wide),
            "ForPreTraining": (
                linear("discriminator_predictions.dense", reads=HIDDEN),
                linear("discriminator_predictions.dense_prediction"),
            ),
        },
    )


def narrow_stem(tables: str, *, wide: bool) -> tuple[Weights, Weights]:
    """The rows of the embeddings.

    :param wide: whether they are as wide as the hidden size, so that no projection follows them.
    """
    if wide:
        return embedding(tables), norm("embeddings.LayerNorm")
    return embedding(tables, writes=None), linear("embeddings_project", writes=HIDDEN.scaled)


def summary(config: PretrainedConfig) -> Weights:
    """The reader of the summary token: its projection, or the classifier where there is none."""
    projected = getattr(config, "summary_use_proj", False)
    return linear("sequence_summary.summary" if projected else "classifier", reads=HIDDEN, rows=(0, 1))


def generator(wide: bool) -> tuple[Weights, ...]:
    """The rows of the masked language modelling head, which works at the width of the embeddings."""
    if not wide:
        return (linear("generator_predictions.dense", reads=HIDDEN), linear("generator_lm_head"))
    return (
        linear("generator_predictions.dense", reads=HIDDEN, writes=HIDDEN),
        norm("generator_predictions.LayerNorm", read_by="generator_lm_head.weight"),
        linear("generator_lm_head", reads=HIDDEN),
    )

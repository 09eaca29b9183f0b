"""RoCBert (Su et al., 2022, doi:10.18653/v1/2022.acl-long.65): BERT's blocks behind embeddings of words, their
shapes and their pronunciations.

The three are joined and projected to the hidden size (`concat_input`), or added where they are as wide as it is.
Joined, they are no part of the residual stream, and keep their width; so does what reads the words' table as a matrix.
"""

from transformers import PretrainedConfig

from cofiprune.adapter import HIDDEN, Family, embedding, family, linear, norm
from cofiprune_adapters import bert


@family(
    "roc_bert",
    test_settings={
        "pronunciation_vocab_size": 30,
        "pronunciation_embed_dim": 10,
        "shape_vocab_size": 30,
        "shape_embed_dim": 11,
    },
)
def adapter(config: PretrainedConfig) -> Family:
    joined = config.concat_input
    predictions = bert.NARROW_MASKED_LM if joined else bert.MASKED_LM
    tables = "embeddings.{word_embeddings,pronunciation_embed,shape_embed}"
    return Family(
        layers="encoder.layer",
        uniform=True,
        stem=(
            embedding(tables, writes=None if joined else HIDDEN),
            embedding("embeddings.{position,token_type}_embeddings"),
            linear("embeddings.map_inputs_layer", writes=HIDDEN.scaled, optional=True),
            norm("embeddings.LayerNorm"),
            bert.POOLER,
        ),
        attention=bert.ATTENTION,
        ffn=bert.FFN,
        heads={
            "ForSequenceClassification": (),
            "ForMultipleChoice": (),
            **bert.TOKEN_HEADS,
            "ForMaskedLM": predictions,
            "ForPreTraining": predictions,
        },
    )

"""RemBERT (Chung et al., 2021, arXiv:2010.12821): BERT's blocks between embeddings of other widths.

The input embeddings and the embeddings of the masked language modelling head are apart, each with a width of its own;
the projections between them and the encoder write and read the hidden dimensions.
"""

from dataclasses import replace

from transformers import PretrainedConfig

from cofiprune.adapter import HIDDEN, Family, embedding, family, linear
from cofiprune_adapters import bert


@family("rembert")
def adapter(config: PretrainedConfig) -> Family:
    plain = bert.adapter.describe(config)
    stem = (
        embedding("embeddings.{word,position,token_type}_embeddings", writes=None),
        linear("encoder.embedding_hidden_mapping_in", writes=HIDDEN.scaled),
        bert.POOLER,
    )
    masked_lm = (linear("cls.predictions.dense", reads=HIDDEN), linear("cls.predictions.decoder"))
    return replace(plain, stem=stem, heads={**plain.heads, "ForMaskedLM": masked_lm})

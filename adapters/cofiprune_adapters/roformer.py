"""RoFormer (Su et al., 2021, arXiv:2104.09864): BERT's blocks with rotary positions.

The positions turn the queries and keys inside a head, by a fixed table that all heads share and no unit cuts. The token
embeddings may be narrower than the hidden size and are then projected to it.
"""

from dataclasses import replace

from transformers import PretrainedConfig

from cofiprune.adapter import Family, embedding, family
from cofiprune_adapters import bert, roberta
from cofiprune_adapters.electra import narrow_stem, summary


@family("roformer")
def adapter(config: PretrainedConfig) -> Family:
    plain = bert.adapter.describe(config)
    wide = config.embedding_size == config.hidden_size
    stem = (
        *narrow_stem("embeddings.{word,token_type}_embeddings", wide=wide),
        embedding("encoder.embed_positions", writes=None),
    )
    heads = {
        **plain.heads,
        "ForSequenceClassification": roberta.CLASSIFIER,
        "ForMultipleChoice": (summary(config),),
        "ForMaskedLM": bert.MASKED_LM if wide else bert.NARROW_MASKED_LM,
    }
    return replace(plain, stem=stem, heads=heads)

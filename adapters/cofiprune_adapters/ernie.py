"""ERNIE (Sun et al., 2020, arXiv:1907.12412), 1.0 to 3.0: BERT with embeddings of the task in addition."""

from dataclasses import replace

from transformers import PretrainedConfig

from cofiprune.adapter import Family, embedding, family
from cofiprune_adapters import bert


@family("ernie")
def adapter(config: PretrainedConfig) -> Family:
    plain = bert.adapter.describe(config)
    return replace(plain, stem=(*plain.stem, embedding("embeddings.task_type_embeddings", optional=True)))

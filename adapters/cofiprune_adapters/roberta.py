"""RoBERTa (Liu et al., 2019, arXiv:1907.11692), XLM-RoBERTa, CamemBERT and Data2Vec for text: BERT's blocks."""

from transformers import PretrainedConfig

from cofiprune.adapter import HIDDEN, Family, family, linear, norm
from cofiprune_adapters import bert

CLASSIFIER = (linear("classifier.dense", reads=HIDDEN, rows=(0, 1)),)
MASKED_LM = (
    linear("lm_head.dense", reads=HIDDEN, writes=HIDDEN),
    norm("lm_head.layer_norm", read_by="lm_head.decoder.weight"),
    linear("lm_head.decoder", reads=HIDDEN),
)


@family("roberta", "xlm-roberta", "camembert", "data2vec-text")
def adapter(config: PretrainedConfig) -> Family:
    return Family(
        layers="encoder.layer",
        uniform=True,
        stem=(bert.TABLES, norm("embeddings.LayerNorm"), bert.POOLER),
        attention=bert.ATTENTION,
        ffn=bert.FFN,
        heads={
            "ForSequenceClassification": CLASSIFIER,
            "ForMultipleChoice": (),
            **bert.TOKEN_HEADS,
            "ForMaskedLM": MASKED_LM,
        },
    )

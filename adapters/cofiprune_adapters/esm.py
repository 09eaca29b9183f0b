"""ESM-2 and ESM-1b (Lin et al., 2023, doi:10.1126/science.ade2574): pre-norm blocks, rotary or learned positions.

Contact prediction reads the attention maps of every head of every layer, so that `predict_contacts` needs a model that
has all of them.
"""

from dataclasses import replace

from transformers import PretrainedConfig

from cofiprune.adapter import HIDDEN, BlockExit, ConfigSizes, Family, embedding, family, linear, norm
from cofiprune_adapters import bert, roberta

ATTENTION, FFN = bert.pre_norm("attention.LayerNorm", "LayerNorm")


@family("esm")
def adapter(config: PretrainedConfig) -> Family:
    """Every head that transformers has for it, protein folding aside."""
    return Family(
        layers="encoder.layer",
        config=ConfigSizes(by_layer=("contact_head.regression.weight",)),
        uniform=True,
        stem=(
            embedding("embeddings.word_embeddings"),
            embedding("embeddings.position_embeddings", optional=True),
            norm("embeddings.layer_norm", optional=True),
            norm("encoder.emb_layer_norm_after"),
            bert.POOLER,
            linear("contact_head.regression", rows=(0, 0)),
        ),
        attention=replace(ATTENTION, exit=BlockExit("attention")),
        ffn=replace(FFN, exit=BlockExit("output", argument=1)),
        heads={
            "ForSequenceClassification": roberta.CLASSIFIER,
            "ForTokenClassification": (linear("classifier", reads=HIDDEN),),
            "ForMaskedLM": roberta.MASKED_LM,
        },
    )

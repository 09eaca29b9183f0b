"""DistilBERT (Sanh et al., 2019, arXiv:1910.01108): BERT's blocks under other names, without token types.

The layer itself adds the residual and runs the norm behind it, so that a block leaves through its norm, and its
attention or feed-forward module gives zeros when it is gone.
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
    embedding,
    family,
    linear,
    norm,
    projection,
)
from cofiprune_adapters import bert

ATTENTION = BlockTable(
    rows=(
        linear("attention.{q,k,v}_lin", reads=HIDDEN, writes=HEADS),
        projection("attention.out_lin", reads=HEADS),
        norm("sa_layer_norm"),
    ),
    exit=BlockExit("sa_layer_norm"),
    bypassed=(BlockExit("attention", keyword="hidden_states", outputs=2, residual=False),),
    attributes=(("attention", "n_heads", HEADS.of(1)), ("attention", "dim", HEADS)),
)
FFN = BlockTable(
    rows=(
        linear("ffn.lin1", reads=HIDDEN, writes=INTERMEDIATE),
        projection("ffn.lin2", reads=INTERMEDIATE),
        norm("output_layer_norm"),
    ),
    exit=BlockExit("output_layer_norm"),
    bypassed=(BlockExit("ffn", residual=False),),
)
POOLED = (linear("pre_classifier", reads=HIDDEN, rows=(0, 1)),)


@family("distilbert")
def adapter(config: PretrainedConfig) -> Family:
    return Family(
        layers="transformer.layer",
        config=ConfigSizes(layers="n_layers", hidden="dim", heads="n_heads", intermediate="hidden_dim"),
        uniform=True,
        # transformers would fill the table of positions anew, in the width of the dense model.
        compacted_settings={"sinusoidal_pos_embds": False} if config.sinusoidal_pos_embds else {},
        stem=(embedding("embeddings.{word,position}_embeddings"), norm("embeddings.LayerNorm")),
        attention=ATTENTION,
        ffn=FFN,
        heads={
            "ForSequenceClassification": POOLED,
            "ForMultipleChoice": POOLED,
            **bert.TOKEN_HEADS,
            "ForMaskedLM": (
                linear("vocab_transform", reads=HIDDEN, writes=HIDDEN),
                norm("vocab_layer_norm", read_by="vocab_projector.weight"),
                linear("vocab_projector", reads=HIDDEN),
            ),
        },
    )

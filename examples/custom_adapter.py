"""Prune an encoder that is not in transformers: an adapter for `toy_encoder.py`, checked, registered and used."""

import torch
from toy_encoder import ToyConfig, ToyForSequenceClassification
from transformers import AutoModelForSequenceClassification

import cofiprune
from cofiprune.adapter import (
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    BlockExit,
    BlockTable,
    Family,
    embedding,
    family,
    linear,
    norm,
    projection,
)

ATTENTION = BlockTable(
    rows=(
        norm("attention_norm"),
        linear("attention.in_proj", reads=HIDDEN, writes=HEADS.times(3)),
        projection("attention.out_proj", reads=HEADS),
    ),
    exit=BlockExit("attention", residual=False),
    bypassed=("attention_norm",),
    attributes=(("attention", "num_heads", HEADS.of(1)),),
)
MLP = BlockTable(
    rows=(
        norm("mlp_norm"),
        linear("mlp.0", reads=HIDDEN, writes=INTERMEDIATE),
        projection("mlp.2", reads=INTERMEDIATE),
    ),
    exit=BlockExit("mlp", residual=False),
    bypassed=("mlp_norm",),
)


@family("toy")
def adapter(config: ToyConfig) -> Family:
    return Family(
        layers="layers",
        stem=(embedding("{token,position}_embeddings"), norm("norm")),
        attention=ATTENTION,
        ffn=MLP,
        heads={"ForSequenceClassification": (linear("classifier", reads=HIDDEN, rows=(0, 1)),)},
    )


if __name__ == "__main__":
    print(cofiprune.check_adapter(adapter))
    cofiprune.register_adapter(adapter)
    ids = torch.randint(1, 40, (256, 12), generator=torch.Generator().manual_seed(0))
    model = ToyForSequenceClassification(ToyConfig())
    rows = [{"input_ids": row, "labels": int(7 in row)} for row in ids]
    small = cofiprune.prune(model, rows, target_sparsity=0.6, epochs=2, finetune_epochs=1).compact()
    small.save_pretrained("runs/custom_adapter")
    small = AutoModelForSequenceClassification.from_pretrained("runs/custom_adapter")
    gap = (small(ids).logits - model.eval()(ids).logits).abs().max().item()
    print(f"{cofiprune.summary(small)}\nFrom the file: logits within {gap:.1g} of the masked model's.")

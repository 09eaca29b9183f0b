"""A family without an adapter goes the whole way: learned gates, recovery, compaction, saving and loading."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, NystromformerForSequenceClassification

import cofiprune
from cofiprune.conformance.specimens import inputs, tiny_config


def test_prune_compact_save_and_load(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = NystromformerForSequenceClassification(tiny_config("nystromformer"))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 40, (48, 9), generator=generator)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(row[0] > 20)} for row in ids]
    result = cofiprune.prune(
        model, rows, target_sparsity=0.6, teacher="self", epochs=2, finetune_epochs=1, batch_size=16, progress=False
    )
    assert abs(result.sparsity - 0.6) <= 0.005
    small = result.compact()
    dense, left = (
        sum(value.numel() for value in each.nystromformer.encoder.layer.parameters()) for each in (model, small)
    )
    assert abs(1 - left / dense - result.sparsity) < 1e-9
    small.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    again.train(False)
    small.train(False)
    batch = inputs(small, generator)
    assert torch.equal(again(**batch).logits, small(**batch).logits)

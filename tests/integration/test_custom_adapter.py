"""An encoder that is not in transformers: its adapter in the examples, and what a model of one's own may do without."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

import cofiprune
from cofiprune.adapter import Adapter
from cofiprune.data.checks import vocabulary_size
from cofiprune.data.tasks import supported_kwargs
from cofiprune.errors import DataError, SettingsError
from small import build

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "custom_adapter.py"
PAGE = ROOT / "docs" / "how-to" / "add-an-adapter.md"


@pytest.fixture(scope="module", name="example")
def _example(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("custom_adapter")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    ids = torch.randint(1, 40, (32, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": int(7 in row)} for row in ids]


def test_the_example_checks_prunes_saves_and_reloads(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = cofiprune.check_adapter
    # One choice of units here; the test below takes them all.
    monkeypatch.setattr(cofiprune, "check_adapter", lambda adapter: check(adapter, heads="Model", units="head"))
    monkeypatch.chdir(tmp_path)
    example.main()
    shown = capsys.readouterr().out
    assert "Every law holds for toy." in shown
    assert re.search(r"sparsity 0\.(59|60)\d* of the layers", shown)
    (gap,) = re.findall(r"logits within (\S+) of the masked model's", shown)
    assert float(gap) < 1e-5
    assert (tmp_path / "runs" / "custom_adapter" / "model.safetensors").is_file()


@pytest.mark.slow
def test_its_adapter_keeps_every_law(example: ModuleType) -> None:
    report = cofiprune.check_adapter(example.adapter)
    assert report.heads == ("ToyForSequenceClassification", "ToyModel")
    assert len(report.choices) == 15
    assert not report.refused
    assert not report.skipped


def test_the_page_shows_what_the_example_has() -> None:
    page = PAGE.read_text(encoding="utf-8")
    parts = [part.strip() for part in re.split(r"\n{2,}(?=\S)", EXAMPLE.read_text(encoding="utf-8"))]
    for begin in ("class ToyAttention(", "class ToyLayer(", "ATTENTION = ", '@family("toy")'):
        (part,) = [part for part in parts if part.startswith(begin)]
        assert part in page


def plain(example: ModuleType, **options: Any) -> Any:
    """A toy encoder whose forward takes what it needs and nothing else."""

    class PlainForSequenceClassification(example.ToyForSequenceClassification):  # type: ignore[misc, name-defined]
        def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> Any:
            return super().forward(input_ids, attention_mask, labels)

    return PlainForSequenceClassification(example.ToyConfig(**options))


def test_a_forward_need_not_take_the_options_of_transformers(
    example: ModuleType, rows: list[dict[str, Any]], register: Callable[[Adapter], None]
) -> None:
    settings = {"target_sparsity": 0.6, "epochs": 1, "finetune_epochs": 1, "teacher": "self", "progress": False}
    register(example.adapter)
    with pytest.raises(SettingsError, match="forward takes no output_hidden_states.*distill_layers_weight=0"):
        cofiprune.prune(plain(example), rows, **settings)
    result = cofiprune.prune(plain(example), rows, distill_layers_weight=0, **settings)
    assert result.sparsity == pytest.approx(0.6, abs=0.03)


def test_options_of_a_forward_are_those_that_it_takes(example: ModuleType) -> None:
    options = {"return_dict": True, "output_hidden_states": False}
    assert supported_kwargs(build("BertModel"), **options) == options
    assert supported_kwargs(example.ToyForSequenceClassification(example.ToyConfig()), **options) == {
        "output_hidden_states": False
    }
    assert supported_kwargs(plain(example), **options) == {}


def test_the_vocabulary_is_the_tables_or_the_configurations(example: ModuleType) -> None:
    model = plain(example, vocab_size=50)
    assert vocabulary_size(model) == 50
    model.embed_tokens = nn.Embedding(60, 4)  # where transformers looks for it
    assert vocabulary_size(model) == 60

    class Silent(PreTrainedModel):
        config_class = PreTrainedConfig

    with pytest.raises(DataError, match="Silent does not say how many token ids it knows.*vocab_size"):
        vocabulary_size(Silent(PreTrainedConfig()))

"""Every setting that a function takes is read by it: what is taken is not forgotten."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainingArguments, default_data_collator

import cofiprune
from cofiprune import PruneConfig, PruningCallback
from cofiprune.errors import TargetError
from cofiprune.training.config import CALLBACK, FINETUNE, RECOVERY, names_of

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 16, "progress": False}
OF_TARGETS = {"engine", "latency_cache", "target_file_dtype"}
"""Read where a target is a time, which takes long to measure, or a file."""


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the settings that are read from now on, other than by what copies or resolves them."""
    names: set[str] = set()
    plain = PruneConfig.__getattribute__

    def noted(self: PruneConfig, name: str) -> Any:
        if name in PruneConfig.model_fields:
            reader = sys._getframe(1).f_code
            if reader.co_name not in ("resolve", "_durations") and "pydantic" not in Path(reader.co_filename).parts:
                names.add(name)
        return plain(self, name)

    monkeypatch.setattr(PruneConfig, "__getattribute__", noted)
    return names


def test_prune_reads_all_settings(toy: Any, read: set[str], tmp_path: Path) -> None:
    data = {"output_dir": tmp_path, "train_dataset": toy.rows(48), "eval_dataset": toy.rows(16), "teacher": toy.teacher}
    asked = {"target_macs": 60_000, "metric_for_best_model": "loss", "round_to": "auto", "repair": True}
    cofiprune.prune(toy.student(), **data, **asked, **QUICK, finetune_epochs=1, freeze_epochs=0)
    assert set(PruneConfig.model_fields) - read - OF_TARGETS == set()


def test_finetune_reads_all_settings_that_it_takes(toy: Any, read: set[str], tmp_path: Path) -> None:
    data = {"output_dir": tmp_path, "eval_dataset": toy.rows(16), "teacher": toy.teacher}
    cofiprune.finetune(toy.student(), toy.rows(32), **data, metric_for_best_model="loss", **QUICK)
    assert set(names_of(*FINETUNE)) - read - set(RECOVERY.values()) == set()


def test_the_callback_reads_all_settings_that_it_takes(toy: Any, read: set[str], tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), num_train_epochs=2, save_strategy="no", report_to=[], use_cpu=True)
    rows = [{**row, "input_ids": (row["input_ids"] + [0] * 16)[:16]} for row in toy.rows(32)]
    callback = PruningCallback(0.5, toy.teacher, round_to="auto")
    Trainer(
        toy.student(), arguments, train_dataset=rows, data_collator=default_data_collator, callbacks=[callback]
    ).train()
    assert set(names_of(*CALLBACK)) - read == set()
    assert callback.result is not None
    assert callback.result.settings.gate_learning_rate == 0.2


@pytest.mark.parametrize("method", ["cofi", "gates", "one-shot"])
def test_a_run_with_the_settings_of_another_is_the_same_run(toy: Any, method: str) -> None:
    def run(**settings: Any) -> cofiprune.PruneResult:
        return cofiprune.prune(toy.student(), toy.rows(48), target_sparsity=0.6, teacher=toy.teacher, **settings)

    first = run(method=method, **QUICK, logging_steps=1, freeze_epochs=0.5)
    again = run(config=PruneConfig(**json.loads(first.settings.model_dump_json())))
    assert again.settings == first.settings
    assert again.plan == first.plan
    losses = [[entry.get("loss") for entry in result.history] for result in (first, again)]
    assert losses[0] == losses[1]


def test_one_shot_units_are_all_that_goes_in_one_shot(toy: Any) -> None:
    asked = {"method": "one-shot", "target_sparsity": 0.1, "one_shot_units": "head"}
    result = cofiprune.prune(toy.student(), toy.rows(48), **asked)
    cut = {name for name, size in result.plan.sizes.items() if result.plan.kept[name] < size}
    assert cut
    assert all(name.endswith(".heads") for name in cut)
    with pytest.raises(TargetError):
        cofiprune.prune(toy.student(), toy.rows(48), **{**asked, "target_sparsity": 0.9})

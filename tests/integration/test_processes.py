"""Several processes, and several batches to a step, train as one process does on larger batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState

import cofiprune
import toy
from cofiprune.data.batches import REPEATED, ROWS
from cofiprune.data.prepare import prepare
from cofiprune.errors import SettingsError
from cofiprune.training.processes import check_processes
from processes import launch, outputs

PROGRAM = """
import json, os
import torch
import cofiprune, toy

out, settings, head, taught, how = json.loads(sys.argv[1])
tags = {"labels": lambda ids: {"labels": [-100 if token % 5 else token % 2 for token in ids]}}
numbers = {"labels": lambda ids: {"labels": len(ids) / 10}}
spans = {"labels": toy.spans}
labels = {"TokenClassification": tags, "QuestionAnswering": spans, "regression": numbers}.get(head, {})
name = "BertFor" + head.replace("regression", "SequenceClassification")
options = {"num_labels": 1 if head == "regression" else 2}
model = toy.bert(name, seed=1, **options).double()
teacher = toy.bert(name, seed=2, num_hidden_layers=3, **options).double() if taught else None
heard = []
common = dict(
    teacher=teacher, logging_steps=1, progress=False, output_dir=out, learning_rate=1e-3,
    callbacks=[lambda entry: heard.append(entry["step"])], eval_dataset=toy.rows(21, seed=3, **labels), dropout=False,
)
rows = toy.rows(53, **labels)
if how == "prune":
    durations = dict(epochs=2, freeze_epochs=1, finetune_epochs=1)
    result = cofiprune.prune(model, rows, target_sparsity=0.6, **durations, **common, **settings)
else:
    result = cofiprune.finetune(model, rows, epochs=2, **common, **settings)
rank = os.environ.get("RANK", "0")
torch.save({"weights": model.state_dict(), "plan": result.plan.to_dict(), "heard": heard,
            "history": toy.without_times(result.history)}, f"{out}/final-{rank}.pt")
"""


def run(folder: Path, count: int, settings: dict[str, Any], head: str, taught: bool, how: str) -> list[dict[str, Any]]:
    folder.mkdir()
    arguments = json.dumps([str(folder), settings, head, taught, how])
    outputs(launch(PROGRAM, arguments, processes=count))
    return [torch.load(folder / f"final-{rank}.pt", weights_only=True) for rank in range(count)]


def assert_alike(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            assert_alike(one[name], other[name], f"{where}.{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_alike(*pair, f"{where}.{index}")
    elif isinstance(one, float | torch.Tensor):
        assert torch.allclose(torch.as_tensor(one), torch.as_tensor(other), atol=1e-5, rtol=1e-5), (where, one, other)
    else:
        assert one == other, where


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "match", "how"),
    [
        ("SequenceClassification", "nearest", "prune"),
        ("TokenClassification", "ordered", "prune"),
        ("TokenClassification", "same-index", "finetune"),
        ("regression", None, "finetune"),
    ],
)
def test_a_step_is_the_same_however_it_is_shared_out(head: str, match: Any, how: str, tmp_path: Path) -> None:
    taught = match is not None
    match = {"distill_layer_match": match, "distill_layers": 2} if taught else {}
    (whole,) = run(tmp_path / "whole", 1, {"batch_size": 16, **match}, head, taught, how)
    settings = {"batch_size": 8, "gradient_accumulation_steps": 2, **match}
    (accumulated,) = run(tmp_path / "accumulated", 1, settings, head, taught, how)
    first, second = run(tmp_path / "two", 2, {"batch_size": 8, **match}, head, taught, how)
    assert_alike(whole, accumulated)
    assert_alike(whole, first)
    assert_alike(first["weights"], second["weights"])
    assert_alike(first["history"], second["history"])
    assert second["heard"] == []


@pytest.mark.parametrize("match", ["nearest", "ordered"])
def test_layers_are_matched_by_all_rows_of_a_step(match: str) -> None:
    def losses(batch: int, accumulated: int) -> list[float]:
        model, teacher = (toy.bert(seed=seed, num_hidden_layers=4).double() for seed in (1, 2))
        settings = {"distill_layer_match": match, "distill_layers": 2, "gradient_accumulation_steps": accumulated}
        common = {"epochs": 1, "logging_steps": 1, "progress": False, "dropout": False, "learning_rate": 1e-3}
        result = cofiprune.finetune(model, toy.rows(53), teacher=teacher, batch_size=batch, **common, **settings)
        return [entry["layers_loss"] for entry in result.history if "layers_loss" in entry]

    whole = losses(8, 1)
    assert len(whole) == 7
    assert losses(2, 4) == pytest.approx(whole, rel=1e-7)


@pytest.mark.parametrize("known", [True, False])
def test_processes_that_do_not_know_of_one_another_are_refused(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    if known:
        check_processes(2)
        return
    model = toy.bert()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    PartialState()  # as something else has set it up, alone
    with pytest.raises(SettingsError, match="WORLD_SIZE=2.*ACCELERATE_USE_CPU=true"):
        cofiprune.finetune(model, toy.rows(8), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


FAILING = """
import os
import cofiprune, toy

rows = toy.rows(48)
def fail(batch):
    if os.environ["RANK"] == "1" and len(seen) > 3:
        raise KeyError("no such column")
    seen.append(1)
    return toy.collate(batch)

seen = []
try:
    cofiprune.finetune(toy.bert(), rows, data_collator=fail, batch_size=4, epochs=4, progress=False)
except Exception as error:
    print("ENDED", type(error).__name__, error, *getattr(error, "__notes__", ()))
    import time; time.sleep(5)
"""


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_of_them() -> None:
    first, second = outputs(launch(FAILING, processes=2))
    assert "ENDED TrainingError another process of this run failed" in first
    assert "ENDED KeyError 'no such column'" in second


@pytest.mark.parametrize(("batch", "accumulated", "processes"), [(4, 1, 3), (3, 4, 1), (3, 2, 2), (5, 3, 2)])
def test_a_step_has_the_rows_of_one_larger_batch(batch: int, accumulated: int, processes: int) -> None:
    rows = toy.rows(53)
    step = batch * accumulated * processes
    whole = prepare(rows, toy.bert(), batch_size=step, shuffle=True, seed=3)
    parts = prepare(rows, toy.bert(), batch_size=batch, shuffle=True, seed=3)
    parts.accumulated = accumulated
    taken: dict[int, list[int]] = {}
    for rank in range(processes):
        part = parts.shard(rank, processes)
        part.with_rows = True
        assert len(part) == len(whole) * accumulated
        for position, given in enumerate(part.epoch(1)):
            taken.setdefault(position // accumulated, []).extend([] if REPEATED in given else given[ROWS].tolist())
    assert [sorted(rows) for rows in taken.values()] == [sorted(rows) for rows in whole.indices(1)]
    assert parts.shard(0, processes).whole().indices(1) == whole.indices(1)

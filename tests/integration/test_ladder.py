"""The rungs between one shot and the full run: gates alone, a budget that picks, and repair after learned gates."""

import copy
import json

import pytest
import torch

import cofiprune
from cofiprune.errors import DataError, SettingsError
from processes import launch, outputs
from toy import assert_masked_is_compacted, unlabelled


def prune(student, rows, **settings):
    return cofiprune.prune(student, rows, **{"target_sparsity": 0.6, "batch_size": 8, "progress": False, **settings})


def divergence(toy, model):
    batch = {"input_ids": torch.tensor([row["input_ids"][:4] for row in toy.rows(64, seed=3)])}
    with torch.no_grad():
        return float((model.eval()(**batch).logits - toy.teacher.eval()(**batch).logits).square().mean())


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_gates_alone_train_no_weights_and_need_no_labels(toy, share):
    student = toy.student()
    flags = [parameter.requires_grad for parameter in student.parameters()]
    before = toy.snapshot(student)
    result = prune(student, unlabelled(64), method="gates", epochs=2, one_shot_share=share, repair=False)
    assert abs(result.sparsity - 0.6) <= 0.005
    assert result.method == "gates"
    assert {entry["phase"] for entry in result.history} <= {"one-shot", "prune"}
    assert toy.is_unchanged(student, before)
    assert [parameter.requires_grad for parameter in student.parameters()] == flags
    assert_masked_is_compacted(student, result.compact())


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_what_gates_leave_is_refitted(toy, share):
    found = []
    for repair in (False, None):
        student = toy.student()
        result = prune(student, unlabelled(128), method="gates", epochs=2, one_shot_share=share, repair=repair)
        small = result.compact()
        assert not result.plan.scale or repair is False
        assert_masked_is_compacted(student, small)
        found.append(divergence(toy, small))
    assert found[1] < found[0]


def test_recovery_follows_gates_where_it_is_asked_for(toy):
    result = prune(toy.student(), unlabelled(64), method="gates", epochs=1, finetune_epochs=1, logging_steps=1)
    assert "recover" in {entry["phase"] for entry in result.history}


def test_repair_after_gates_and_weights_keeps_the_law(toy):
    student = toy.student()
    brief = {"epochs": 1, "freeze_epochs": 0, "finetune_epochs": 0}
    result = prune(student, toy.rows(64), teacher=toy.teacher, repair=True, **brief)
    assert abs(result.sparsity - 0.6) <= 0.005
    assert not result.plan.scale
    assert_masked_is_compacted(student, result.compact())


def test_without_repair_one_shot_leaves_the_weights(toy):
    student = toy.student()
    before = toy.snapshot(student)
    cofiprune.prune(student, toy.rows(64), target_sparsity=0.5, method="one-shot", repair=False, progress=False)
    assert toy.is_unchanged(student, before)
    student = toy.student()
    cofiprune.prune(student, toy.rows(64), target_sparsity=0.5, method="one-shot", progress=False)
    assert not toy.is_unchanged(student, before)


@pytest.mark.filterwarnings("ignore:pruning without data")
def test_without_repair_and_data_the_weights_stay(toy):
    student = toy.student()
    before = toy.snapshot(student)
    result = cofiprune.prune(student, target_sparsity=0.5, teacher=copy.deepcopy(toy.teacher), repair=False)
    assert result.method == "no data"
    assert toy.is_unchanged(student, before)


@pytest.mark.parametrize(
    ("settings", "rows", "why"),
    [
        ({"units": "hidden", "target_sparsity": 0.4826}, 64, 'units must include "head" or "intermediate"'),
        ({"units": "head", "target_sparsity": 0.4115}, 64, "the nearest plan"),
        ({}, 2, "at least 48"),
        ({"freeze_epochs": 0}, 64, "freeze_epochs is of gates"),
    ],
)
def test_auto_leaves_to_gates_what_one_shot_cannot_do(toy, settings, rows, why, tmp_path):
    brief = {"epochs": 1, "finetune_epochs": 1, "output_dir": tmp_path, **settings}
    result = prune(toy.student(), toy.rows(rows), **brief)
    assert (result.method, result.settings.method) == ("cofi", "cofi")
    assert why in result.reason
    assert abs(result.sparsity - brief.get("target_sparsity", 0.6)) <= 0.005
    again = prune(toy.student(), toy.rows(rows), resume=True, **brief)
    assert (again.plan, again.reason) == (result.plan, result.reason)


def test_by_default_the_epochs_are_for_recovery_and_labels_teach_where_there_are_any(toy):
    for rows, parts in ((toy.rows(64), {"label_loss"}), (unlabelled(64), {"logits_loss", "layers_loss"})):
        result = prune(toy.student(), rows, logging_steps=1, learning_rate=3e-3)
        assert result.settings.finetune_epochs == result.history[-1]["epoch"] == 6
        assert result.history[1]["learning_rate"] == pytest.approx(3e-3)
        assert {name for name in result.history[-1] if name.endswith("_loss")} == parts
        assert "6 epochs" in result.reason


def test_auto_says_what_it_picked_and_why(toy, tmp_path, capsys):
    arguments = {"target_sparsity": 0.6, "method": "auto", "batch_size": 8}
    result = cofiprune.prune(toy.student(), toy.rows(64), epochs=0, output_dir=tmp_path, **arguments)
    assert result.method == "one-shot"
    assert "epochs is 0" in result.reason
    assert result.reason in repr(result)
    assert capsys.readouterr().err.count(result.reason) == 1
    chosen = json.loads((tmp_path / "choice.json").read_text())
    assert (chosen["finetune_epochs"], chosen["reason"]) == (0, result.reason)
    result = cofiprune.prune(toy.student(), toy.rows(64), epochs=1, finetune_epochs=1, **arguments)
    assert (result.method, result.history[-1]["phase"], result.history[-1]["epoch"]) == ("one-shot", "recover", 2)


def test_a_time_budget_is_spent_and_too_short_a_one_is_refused(toy, monkeypatch):
    student = toy.student()
    before = toy.snapshot(student)
    arguments = {"target_sparsity": 0.6, "method": "auto", "batch_size": 8, "progress": False}
    with pytest.raises(SettingsError, match="too short"):
        cofiprune.prune(student, toy.rows(64), time_budget=1e-4, **arguments)
    assert toy.is_unchanged(student, before)
    assert cofiprune.masking.masks_of(student) is None
    result = cofiprune.prune(student, unlabelled(64), time_budget="10m", **arguments)
    assert result.history[-1]["phase"] == "recover"
    assert "epochs of recovery" in result.reason


@pytest.mark.slow
def test_processes_go_by_one_measurement():
    program = """
import cofiprune, toy

arguments = {"target_sparsity": 0.6, "method": "auto", "time_budget": 20, "batch_size": 8, "progress": False}
print("picked", cofiprune.prune(toy.bert(), toy.rows(64), **arguments).reason)
"""
    first, second = (text.partition("picked")[2] for text in outputs(launch(program, processes=2)))
    assert "epochs of recovery" in first
    assert first == second


def test_gates_need_rows_for_their_repair_and_say_how_many(toy):
    student = toy.student()
    before = toy.snapshot(student)
    with pytest.raises(DataError, match="at least 48"):
        prune(student, toy.rows(2), method="gates", epochs=1, batch_size=2)
    assert toy.is_unchanged(student, before)


def test_recovery_follows_one_shot_where_it_is_asked_for(toy, tmp_path):
    rows, saved = unlabelled(64), {"finetune_epochs": 2, "checkpoint_steps": 5, "output_dir": tmp_path}
    whole = prune(toy.student(), rows, method="one-shot", **saved)
    assert whole.history[0]["phase"] == "one-shot"
    assert {entry["phase"] for entry in whole.history[1:]} == {"recover"}
    assert abs(whole.sparsity - 0.6) <= 0.005
    assert whole.history[-1]["epoch"] == 2
    bare = prune(toy.student(), rows, method="one-shot")
    assert bare.plan == whole.plan
    assert not toy.is_unchanged(whole.compact(), toy.snapshot(bare.compact()))
    last = max(tmp_path.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    again = prune(toy.student(), rows, method="one-shot", resume=True, **saved)
    assert last.is_dir()
    assert toy.is_unchanged(again.compact(), toy.snapshot(whole.compact()))

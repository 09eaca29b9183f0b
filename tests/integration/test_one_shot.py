"""`prune` on data without training: exact, unlabelled, the weights repaired, nothing else touched."""

import copy

import pytest
import torch

import cofiprune
from cofiprune.errors import DataError, SettingsError, TargetError
from toy import assert_masked_is_compacted, unlabelled


@pytest.mark.parametrize("target", [0.3, 0.6, 0.9])
def test_sparsity_is_exact_and_compact_follows(toy, target, tmp_path):
    student = toy.student()
    result = cofiprune.prune(
        student, unlabelled(64), target_sparsity=target, method="one-shot", eval_dataset=toy.rows(32, seed=2),
        output_dir=tmp_path / "not" / "there", progress=False,
    )  # fmt: skip
    small = result.compact()
    assert abs(result.sparsity - target) <= 0.005
    assert abs(cofiprune.summary(small).sparsity - target) <= 0.005
    assert_masked_is_compacted(student, small)
    assert [entry["phase"] for entry in result.history] == ["one-shot"]
    assert result.metrics["eval_accuracy"] == cofiprune.evaluate(small, toy.rows(32, seed=2))["accuracy"]
    assert cofiprune.Plan.load(tmp_path / "not" / "there" / "plan.json") == result.plan


def test_repair_on_data_comes_nearer_than_the_plan_alone(toy):
    teacher, rows = toy.teacher, toy.rows(128)
    result = cofiprune.prune(toy.student(), rows, target_sparsity=0.6, method="one-shot", progress=False)
    bare = cofiprune.compact(copy.deepcopy(teacher), result.plan)
    batch = {"input_ids": torch.tensor([row["input_ids"][:4] for row in toy.rows(32, seed=3)])}
    with torch.no_grad():
        wanted = teacher.eval()(**batch).logits
        distances = [(model.eval()(**batch).logits - wanted).norm() for model in (result.compact(), bare)]
    assert distances[0] < distances[1]


def test_wrong_use(toy):
    rows = toy.rows(64)
    for error, words, changes in (
        (TargetError, ('"head"', '"intermediate"'), {"units": ("hidden",)}),
        (TargetError, ("cannot be reached", "head"), {"units": ("head", "hidden"), "target_sparsity": 0.9}),
        (SettingsError, ("resume=True",), {"resume": True, "output_dir": "missing"}),
        (SettingsError, ("one-shott", "one-shot"), {"method": "one-shott"}),
        (DataError, ("positions", "48"), {"train_dataset": toy.rows(2)}),
    ):
        student = toy.student()
        before = toy.snapshot(student)
        arguments = {"train_dataset": rows, "target_sparsity": 0.5, "method": "one-shot", "progress": False, **changes}
        with pytest.raises(error) as caught:
            cofiprune.prune(student, **arguments)
        assert all(word in str(caught.value) for word in words), caught.value
        assert toy.is_unchanged(student, before)
        assert cofiprune.masking.masks_of(student) is None

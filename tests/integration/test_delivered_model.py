"""The model handed out is the model that was measured, to the bit, whatever the method."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

import cofiprune
from cofiprune.oneshot import data_free
from toy import assert_masked_is_compacted, logits

BRIEF = {"epochs": 1, "finetune_epochs": 0, "batch_size": 16, "progress": False}


class Predictions:
    """A `compute_metrics` that remembers the predictions of the last evaluation."""

    def __call__(self, evaluated: Any) -> dict[str, float]:
        self.last = np.asarray(evaluated.predictions)
        return {"mean": float(self.last.mean())}


def check_delivered(result: Any, seen: Predictions, rows: list[dict[str, Any]], *, exactly: bool = True) -> None:
    """The compacted model predicts what the last evaluation saw, and scores what the result says.

    :param exactly: False where the last evaluation was of the masked model, which computes the same in another order.
    """
    measured, small = seen.last, result.compact()
    again = cofiprune.evaluate(small, rows, compute_metrics=seen, batch_size=64)
    tolerance = 0 if exactly else 1e-5
    np.testing.assert_allclose(seen.last, measured, rtol=0, atol=tolerance)
    assert result.metrics == pytest.approx({f"eval_{name}": value for name, value in again.items()}, abs=tolerance)
    assert_masked_is_compacted(result.model, small)


@pytest.mark.parametrize(
    ("settings", "exactly"),
    [
        ({"method": "one-shot"}, True),
        ({"method": "one-shot", "units": ("head", "intermediate", "hidden")}, True),
        ({"method": "one-shot", "repair": False}, True),
        ({"method": "one-shot", "finetune_epochs": 1}, True),
        ({"method": "one-shot", "uniform": True, "target_sparsity": 0.5}, True),
        ({"method": "auto"}, True),
        ({"method": "cofi", "finetune_epochs": 1}, True),
        ({"method": "cofi", "finetune_epochs": 1, "one_shot_share": 0}, True),
        ({"method": "cofi", "finetune_epochs": 1, "compact_in_training": True}, True),
        ({"method": "cofi"}, False),
        ({"method": "gates", "one_shot_share": 0.5}, False),
        ({"method": "gates", "one_shot_share": 0}, False),
        ({"method": "gates", "finetune_epochs": 1}, True),
    ],
)
def test_what_a_run_on_data_measured_is_what_it_hands_out(toy, settings, exactly):
    rows, seen = toy.rows(48, seed=2), Predictions()
    result = cofiprune.prune(
        toy.student(), toy.rows(64), teacher="self", eval_dataset=rows, compute_metrics=seen,
        **{"target_sparsity": 0.7, "eval_batch_size": 64, **BRIEF, **settings},
    )  # fmt: skip
    check_delivered(result, seen, rows, exactly=exactly)


@pytest.mark.filterwarnings("ignore:pruning without data")
@pytest.mark.parametrize("target", [0.5, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("teacher", ["self", None])
def test_without_data_the_accepted_model_is_handed_out(toy, monkeypatch, teacher, target):
    accepted: list[Any] = []

    def kept(model: Any, *arguments: Any, **settings: Any) -> float:
        accepted.append(copy.deepcopy(model))
        return measure(model, *arguments, **settings)

    measure = data_free.divergence
    monkeypatch.setattr(data_free, "divergence", kept)
    rows, seen = toy.rows(48, seed=2), Predictions()
    wide = toy.bert(hidden_size=48, num_hidden_layers=3, seed=3)
    result = cofiprune.prune(
        wide, target_sparsity=target, teacher=teacher, seed=3, eval_dataset=rows, compute_metrics=seen,
        eval_batch_size=64,
    )  # fmt: skip
    assert result.plan.kept["hidden"] < 48 or target < 0.8
    check_delivered(result, seen, rows, exactly=False)
    if teacher is not None:
        before, after = (logits(model) for model in accepted)
        assert not torch.equal(before, after)
        assert torch.equal(logits(result.compact()), after)


def test_points_of_a_sweep_are_what_was_measured(toy, tmp_path):
    rows, seen, student = toy.rows(48, seed=2), Predictions(), toy.student()
    points = cofiprune.prune(
        student, toy.rows(64), target_sparsity=[0.4, 0.7], teacher="self", eval_dataset=rows,
        compute_metrics=seen, output_dir=tmp_path, method="one-shot", eval_batch_size=64, **BRIEF,
    )  # fmt: skip
    for point in points:
        again = cofiprune.evaluate(point.model, rows, compute_metrics=seen, batch_size=64)
        assert point.metrics == {f"eval_{name}": value for name, value in again.items()}
        assert torch.equal(logits(type(point.model).from_pretrained(point.folder)), logits(point.model))
    assert torch.equal(logits(cofiprune.compact(student)), logits(points[-1].model))

"""Compaction while gates learn: what is computed, learned and saved is what it would be with the units closed."""

import itertools
import signal

import pytest
import torch

import cofiprune
from toy import assert_masked_is_compacted

pytestmark = pytest.mark.usefixtures("started_by_hand")
SETTINGS = {
    "target_sparsity": 0.8, "one_shot_share": 0, "epochs": 12, "sparsity_warmup_epochs": 3, "freeze_epochs": 2,
    "finetune_epochs": 1, "batch_size": 16, "logging_steps": 1, "progress": False, "seed": 0,
}  # fmt: skip
DECIDED = 60
"""The step at which gates are decided on; what is trained after it is what they leave."""


def prune(toy, student, **changes):
    return cofiprune.prune(student, toy.rows(96, seed=1), teacher=toy.teacher, **{**SETTINGS, **changes})


def is_cut_of(small, large):
    """Whether one tensor is the other without some of its rows and columns: its values come in the same order."""
    values = iter(large.flatten().tolist())
    return small.dim() == large.dim() and all(value in values for value in small.flatten().tolist())


@pytest.fixture(scope="module")
def whole(toy):
    """A run that is not disturbed, and the model that it was of."""
    student = toy.student()
    return prune(toy, student), student


@pytest.mark.parametrize("units", [None, ("head", "intermediate"), ("layer", "intermediate")])
def test_a_model_that_shrinks_while_it_learns_keeps_the_laws(toy, watch, units):
    student, target = toy.student(), 0.8 if units is None else 0.6
    steps = watch(student)
    result = prune(toy, student, units=units, target_sparsity=target)
    gated = steps[:DECIDED]
    shrinks = [(old, new) for old, new in itertools.pairwise(gated) if new.model is not old.model]
    assert shrinks, "nothing was closed for long enough in this run: the test shows nothing"
    dense = toy.parameters_of_layers(toy.teacher, cofiprune.structure(toy.teacher))
    for old, new in shrinks:
        assert new.size < old.size
        # Gates may open again until they are decided on: never less than the target leaves.
        left = toy.parameters_of_layers(new.model, cofiprune.structure(new.model))
        assert left >= (1 - target) * dense
        # What learns on is a part of what learned before, moments included; between steps, gates are clamped.
        anew = [name for name, value in new.before.items() if not is_cut_of(value, old.after[name])]
        assert all(name.startswith("other") and new.before[name].dim() == 1 for name in anew)
        gone = {name.split(" of ")[-1] for name in old.after.keys() - new.before.keys()}
        assert gone.isdisjoint(new.before)
    assert abs(result.sparsity - target) <= 0.005
    assert_masked_is_compacted(student)
    assert all("expected_sparsity" not in entry or entry["expected_sparsity"] < 1 for entry in result.history)


def test_the_expected_sparsity_goes_on_from_where_it_was(toy, whole, watch):
    result, _ = whole
    course = [entry["expected_sparsity"] for entry in result.history if "expected_sparsity" in entry]
    asked = [entry["target_sparsity"] for entry in result.history if "target_sparsity" in entry]
    assert asked == sorted(asked)
    # No step is larger than those of a run that keeps all units: none falls back when they are taken out.
    student = toy.student()
    steps = watch(student)
    still = prune(toy, student, compact_in_training=False)
    assert len({id(step.model) for step in steps[:DECIDED]}) == 1
    assert abs(still.sparsity - 0.8) <= 0.005
    other = [entry["expected_sparsity"] for entry in still.history if "expected_sparsity" in entry]
    largest = max(abs(b - a) for a, b in itertools.pairwise(other))
    assert max(abs(b - a) for a, b in itertools.pairwise(course)) < 2 * largest + 0.02


@pytest.mark.parametrize("stop", [20, 40, 56])
def test_a_run_that_shrinks_is_stopped_and_resumed_to_the_bit(toy, whole, tmp_path, stop):
    def stops(entry):
        if entry["step"] == stop and "loss" in entry:
            signal.raise_signal(signal.SIGINT)

    student = toy.student()
    with pytest.raises(KeyboardInterrupt):
        prune(toy, student, output_dir=tmp_path, callbacks=[stops])
    assert 0 < cofiprune.masking.masks_of(student).sparsity() < 0.8
    assert_masked_is_compacted(student)  # a model that is stopped is usable
    student = toy.student()
    result = prune(toy, student, output_dir=tmp_path, resume=True)
    expected, model = whole
    assert result.plan == expected.plan
    for name, value in model.state_dict().items():
        assert torch.equal(student.state_dict()[name], value), name

"""Compaction while gates learn: what is computed, learned and saved is what it would be with the units shut."""

import itertools
import signal

import pytest
import torch

import cofiprune
from cofiprune.masking import attach
from cofiprune.plan import Plan
from cofiprune.training.shrinking import Learner

INPUTS = {"input_ids": torch.tensor([[2, 5, 9, 11, 0, 0], [2, 8, 6, 7, 30, 12]])}
INPUTS["attention_mask"] = (INPUTS["input_ids"] != 0).long()
pytestmark = pytest.mark.usefixtures("started_by_hand")
SETTINGS = {
    "target_sparsity": 0.8,
    "one_shot_share": 0,
    "epochs": 12,
    "sparsity_warmup_epochs": 3,
    "freeze_epochs": 2,
    "finetune_epochs": 1,
    "batch_size": 16,
    "logging_steps": 1,
    "progress": False,
    "seed": 0,
}


def prune(toy, student, **changes):
    return cofiprune.prune(student, toy.rows(96, seed=1), teacher=toy.teacher, **{**SETTINGS, **changes})


@pytest.fixture
def shrunk(monkeypatch):
    """Every compaction of a run: the learner before (model, gates, moments), the plan, the learner after."""
    found = []
    original = Learner.shrink

    def watched(self, plan, small, with_optimizer):
        model, gating, state = self.model, self.gating, self.state
        original(self, plan, small, with_optimizer)
        found.append((model, gating, state, plan, self.model, self.gating, self.state))
        compare_answers(model, gating, plan, self.model, self.gating)
        compare_moments(model, gating, state, plan, self)

    monkeypatch.setattr(Learner, "shrink", watched)
    return found


def answers(model, masks, values):
    masks.bind(values)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        logits = model(**INPUTS).logits
    for module, mode in modes:
        module.training = mode
    masks.unbind()
    return logits


def compare_answers(model, gating, plan, small, inner):
    """The same under the same sample of the gates that are left, the others shut."""
    sample = gating.gates.sample(0, 12345)
    shut, left = {}, {}
    for name, value in sample.items():
        keep = list(plan.keep[name])
        mask = torch.zeros_like(value).index_fill(0, torch.tensor(keep, dtype=torch.long), 1.0)
        shut[name] = (value * mask).detach()
        if keep:
            left[name] = value.detach()[keep]
    before, after = answers(model, gating.masks, shut), answers(small, inner.masks, left)
    assert (before - after).abs().max() < 1e-5
    assert before.abs().max() > 1e-3


def compare_moments(model, gating, state, plan, learner):
    old = {name: state.optimizer.state.get(value) for name, value in model.named_parameters()}
    new = {name: learner.state.optimizer.state.get(value) for name, value in learner.model.named_parameters()}
    for block in gating.masks.structure.blocks:
        if not plan.kept[block.gate]:
            continue
        for spec in gating.masks.structure.parameters:
            if spec.gate == block.gate and len(spec.shape) == 2 and spec.sides[0] is not None:
                side = spec.sides[0]
                rows = torch.arange(side.length).view(side.copies, side.units, side.block)
                kept = rows[:, list(plan.keep[side.group])].flatten()
                columns = spec.sides[1]
                moved = old[spec.name]["exp_avg"][kept]
                if columns is not None:
                    grid = torch.arange(columns.length).view(columns.copies, columns.units, columns.block)
                    moved = moved[:, grid[:, list(plan.keep[columns.group])].flatten()]
                assert torch.equal(new[spec.name]["exp_avg"], moved)
                assert new[spec.name]["step"] == old[spec.name]["step"]
    multiplier = gating.constraint.lambda_1
    kept = learner.state.optimizer.state[multiplier]
    assert torch.equal(kept["exp_avg"], state.optimizer.state[multiplier]["exp_avg"])


@pytest.mark.parametrize("units", [None, ("head", "intermediate"), ("layer", "intermediate")])
def test_a_model_that_shrinks_while_it_learns_keeps_the_laws(toy, shrunk, units):
    student = toy.student()
    result = prune(toy, student, units=units, target_sparsity=0.8 if units is None else 0.6)
    assert shrunk, "nothing was shut for long enough in this run: the test shows nothing"
    sizes = [sum(p.numel() for p in after[4].parameters()) for after in shrunk]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] < sum(p.numel() for p in student.parameters())
    assert abs(result.sparsity - (0.8 if units is None else 0.6)) <= 0.005
    small = result.compact()
    with torch.no_grad():
        assert (small(**INPUTS).logits - student.eval()(**INPUTS).logits).abs().max() < 1e-5
    assert all("expected_sparsity" not in entry or entry["expected_sparsity"] < 1 for entry in result.history)


def test_the_expected_sparsity_goes_on_from_where_it_was(toy, shrunk):
    result = prune(toy, toy.student())
    assert shrunk
    course = [entry["expected_sparsity"] for entry in result.history if "expected_sparsity" in entry]
    asked = [entry["target_sparsity"] for entry in result.history if "target_sparsity" in entry]
    assert asked == sorted(asked)
    # No step is larger than those of a run that keeps all units: none falls back when they are taken out.
    still = prune(toy, toy.student(), compact_in_training=False)
    other = [entry["expected_sparsity"] for entry in still.history if "expected_sparsity" in entry]
    largest = max(abs(b - a) for a, b in itertools.pairwise(other))
    assert max(abs(b - a) for a, b in itertools.pairwise(course)) < 2 * largest + 0.02


def test_it_can_be_switched_off(toy, shrunk):
    result = prune(toy, toy.student(), compact_in_training=False)
    assert not shrunk
    assert abs(result.sparsity - 0.8) <= 0.005


@pytest.mark.parametrize("stop", [20, 40, 56])
def test_a_run_that_shrinks_is_resumed_to_the_bit(toy, tmp_path, stop):
    whole = toy.student()
    expected = prune(toy, whole, output_dir=tmp_path / "whole")

    def stops(entry):
        if entry["step"] == stop and "loss" in entry:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        prune(toy, toy.student(), output_dir=tmp_path / "cut", callbacks=[stops])
    student = toy.student()
    result = prune(toy, student, output_dir=tmp_path / "cut", resume=True)
    assert result.plan == expected.plan
    for name, value in whole.state_dict().items():
        if name in student.state_dict():
            assert torch.equal(student.state_dict()[name], value), name


def test_a_run_that_is_stopped_after_it_has_shrunk_leaves_the_model_usable(toy, shrunk):
    student = toy.student()

    def stops(entry):
        if shrunk and "loss" in entry:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        prune(toy, student, callbacks=[stops])
    masks = cofiprune.masking.masks_of(student)
    assert masks is not None
    assert masks.sparsity() > 0
    small = cofiprune.compact(student)
    with torch.no_grad():
        assert (small(**INPUTS).logits - student.eval()(**INPUTS).logits).abs().max() < 1e-5


def test_a_plan_beyond_the_target_is_not_taken(toy):
    from cofiprune.gates import Gates
    from cofiprune.selection.target import Target
    from cofiprune.training.shrinking import Shut

    model = toy.bert()
    with attach(model) as masks:
        gates = Gates(list(masks.structure.groups))
        shut = Shut(gates)
        target = Target.of(masks.structure, 0.5)
        assert shut.plan(gates, masks, target) is None
        with torch.no_grad():
            gates.log_alpha.fill_(-20)
        for _ in range(3):
            shut.look(gates)
        assert shut.plan(gates, masks, target) is None
        shut.looks.zero_()
        first = gates.groups[-1]
        shut.looks[-first.size :] = 3
        plan = shut.plan(gates, masks, target)
        assert isinstance(plan, Plan)
        assert plan.kept[first.name] == 0

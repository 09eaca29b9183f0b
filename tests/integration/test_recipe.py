"""The course of a run: what learns when, at which rate, on which model and from what."""

import pytest
import torch

import cofiprune
from cofiprune import PruneConfig
from cofiprune.training.resolved import Facts, Schedule, resolve

BRIEF = {"batch_size": 16, "progress": False, "seed": 0, "logging_steps": 1}


def of_phase(result, phase, key="loss"):
    return [entry for entry in result.history if entry["phase"] == phase and key in entry]


def sizes(model):
    return dict(cofiprune.structure(model).sizes)


def test_gates_start_on_what_one_shot_leaves_and_from_nothing_in_the_original(toy, watch):
    student, rows = toy.student(), toy.rows(32)
    steps = watch(student)
    settings = {**BRIEF, "epochs": 2, "freeze_epochs": 0, "sparsity_warmup_epochs": 1, "finetune_epochs": 0}
    result = cofiprune.prune(student, rows, target_sparsity=0.7, one_shot_share=0.5, **settings)
    (first,) = of_phase(result, "one-shot", "sparsity")
    assert result.history[0] == first
    one_unit = 0.05  # a head of the toy
    assert first["sparsity"] == pytest.approx(1 - 0.3**0.5, abs=one_unit)
    asked = [entry["target_sparsity"] for entry in of_phase(result, "prune", "target_sparsity")]
    assert asked == sorted(asked)
    assert asked[0] == pytest.approx(first["sparsity"])
    assert asked[-1] == pytest.approx(0.7)
    assert sum(sizes(steps[0].model).values()) < sum(sizes(toy.teacher).values())
    assert abs(result.sparsity - 0.7) <= 0.005

    student = toy.student()
    steps = watch(student)
    result = cofiprune.prune(student, rows, target_sparsity=0.7, one_shot_share=0, **settings)
    assert not of_phase(result, "one-shot", "sparsity")
    assert of_phase(result, "prune", "target_sparsity")[0]["target_sparsity"] == 0
    assert sizes(steps[0].model) == sizes(toy.teacher)


def test_batches_after_pruning_may_have_another_size(toy, watch):
    student = toy.student()
    steps = watch(student)
    settings = {**BRIEF, "epochs": 1, "freeze_epochs": 0, "finetune_epochs": 2, "finetune_batch_size": 24}
    result = cofiprune.prune(student, toy.rows(48), target_sparsity=0.5, **settings)
    assert [step.batch[0] for step in steps] == [16] * 3 + [24] * 4
    assert result.history[-1]["epoch"] == 3
    recipe = PruneConfig.preset("glue-small", label_weight=1)
    for given, count in (({}, 1), ({"batch_size": 8}, 6), ({"finetune_batch_size": 16}, 3)):
        result = cofiprune.finetune(toy.student(), toy.rows(48), config=recipe, epochs=1, progress=False, **given)
        assert result.history[-1]["step"] == count


@pytest.mark.parametrize(
    ("settings", "ramp", "after"),
    [
        ({}, 125, 875),
        ({"one_shot_share": 0}, 400, 250),
        ({"freeze_epochs": 0, "sparsity_warmup_epochs": 2}, 200, 0),
        ({"freeze_epochs": 3, "sparsity_warmup_epochs": 0}, 0, 300),
    ],
)
def test_the_last_part_of_the_epochs_trains_the_decided_structure(settings, ramp, after):
    settings = resolve(PruneConfig(method="cofi", epochs=10, **settings), Facts(100, target=0.9))
    schedule = Schedule.for_pruning(settings, 100)
    assert (schedule.ramp, schedule.gated, schedule.after) == (ramp, 1000 - after, after)


def test_plain_epochs_come_first_then_the_rate_starts_again_and_adam_goes_on(toy, watch):
    student = toy.student()
    seen = watch(student)
    settings = {**BRIEF, "epochs": 2, "pre_finetune_epochs": 1, "freeze_epochs": 0, "finetune_epochs": 1}
    result = cofiprune.prune(student, toy.rows(64), target_sparsity=0.5, learning_rate=1e-3, **settings)
    steps = of_phase(result, "prune")
    assert ["target_sparsity" in step for step in steps] == [False] * 4 + [True] * 8
    assert ["constraint" in step for step in steps] == [False] * 4 + [True] * 8
    rates = [step["learning_rate"] for step in steps]
    assert rates[:4] == pytest.approx([1e-3 * (1 - step / 4) for step in range(4)])
    assert rates[4:] == pytest.approx([1e-3 * (1 - step / 8) for step in range(8)])
    assert len(seen) == 16
    pruning, recovery = seen[11], seen[15]
    assert (pruning.after["step of classifier.weight"], recovery.after["step of classifier.weight"]) == (12, 4)
    dense, left = (sum(p.numel() for p in model.parameters()) for model in (toy.teacher, result.compact()))
    assert (pruning.size, recovery.size) == (dense, left)
    assert left < dense


def test_gates_are_clipped_on_their_own(toy, watch, monkeypatch):
    student, unscaled = toy.student(), []
    # The loss scaling of float16 may be undone once a step, or torch refuses the second time.
    monkeypatch.setattr("accelerate.Accelerator.unscale_gradients", lambda self, optimizer=None: unscaled.append(1))
    steps = watch(student)
    settings = {**BRIEF, "epochs": 1, "freeze_epochs": 0, "finetune_epochs": 0, "one_shot_share": 0}
    cofiprune.prune(student, toy.rows(32), target_sparsity=0.5, max_grad_norm=1e-6, **settings)
    assert [step.norms for step in steps] == [pytest.approx((1e-6, 1e-6), rel=1e-2)] * 2
    assert len(unscaled) == len(steps)


@pytest.mark.parametrize(
    ("settings", "taught", "weights"),
    [
        ({}, True, {"label_loss": 0.5, "logits_loss": 1, "layers_loss": 2}),
        ({"label_weight": 0}, True, {"logits_loss": 1, "layers_loss": 2}),
        ({"label_weight": 3, "distill_layers_weight": 0}, True, {"label_loss": 3, "logits_loss": 1}),
        ({}, False, {"label_loss": 1}),
    ],
)
def test_the_loss_is_the_weighted_sum_of_its_parts(toy, settings, taught, weights):
    teacher = toy.bert(seed=4) if taught else None
    result = cofiprune.finetune(toy.student(), toy.rows(32), teacher=teacher, epochs=1, **BRIEF, **settings)
    for entry in result.history:
        assert {name for name in entry if name.endswith("_loss")} == weights.keys()
        assert entry["loss"] == pytest.approx(sum(weight * entry[name] for name, weight in weights.items()), rel=1e-5)


def test_the_last_weights_are_kept_unless_a_metric_is_to_choose(toy):
    student, seen = toy.student(), []

    def worse_and_worse(prediction):
        seen.append(torch.from_numpy(prediction.predictions).clone())
        return {"score": -len(seen)}

    rows = toy.rows(16, seed=2)
    result = cofiprune.finetune(
        student, toy.rows(32), eval_dataset=rows, compute_metrics=worse_and_worse, epochs=3, **BRIEF
    )
    assert result.best_step is None
    assert result.metrics["eval_score"] == -len(seen)
    cofiprune.evaluate(student, rows, compute_metrics=worse_and_worse)
    assert (seen[-1] - seen[-2]).abs().max() < 1e-5
    assert not torch.equal(seen[-1], seen[0])


def test_the_map_to_the_teachers_states_starts_as_the_identity_or_fitted(toy, watch):
    settings = {**BRIEF, "epochs": 1, "freeze_epochs": 0, "finetune_epochs": 0, "one_shot_share": 0}
    for teacher, width in ((toy.teacher, 16), (toy.bert(seed=3, hidden_size=24), 24)):
        student = toy.student()
        steps = watch(student)
        cofiprune.prune(student, toy.rows(32), target_sparsity=0.5, teacher=teacher, **settings)
        (weight,) = [v for name, v in steps[0].before.items() if name.startswith("other") and v.shape == (width, 16)]
        assert torch.equal(weight, torch.eye(16)) == (width == 16)


@pytest.mark.parametrize(
    ("given", "taught", "on"), [(None, True, False), (None, False, True), (True, True, True), (False, False, False)]
)
def test_dropout_is_off_where_a_teacher_is_learned_from_or_as_it_is_said(toy, watch, given, taught, on):
    student = toy.student()
    steps = watch(student)
    cofiprune.finetune(student, toy.rows(16), teacher=toy.teacher if taught else None, epochs=1, dropout=given, **BRIEF)
    assert [step.trains for step in steps] == [on]


def test_gradient_checkpointing_keeps_train_mode(toy, watch):
    student = toy.student()
    steps = watch(student)
    # The method's name changes between the releases of transformers.
    enable = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    cofiprune.finetune(student, toy.rows(16), teacher=toy.teacher, epochs=1, **BRIEF)
    assert [step.trains for step in steps] == [True]


def test_batches_are_padded_to_a_multiple_where_that_is_asked_for(toy, watch):
    student = toy.student()
    steps = watch(student)
    cofiprune.finetune(student, toy.rows(48), epochs=1, pad_to_multiple_of=4, **{**BRIEF, "batch_size": 4})
    lengths = {step.batch[1] for step in steps}
    assert lengths <= {4, 8, 12, 16}
    assert len(lengths) > 1

"""`PruningCallback` inside a stock Trainer, on the toy task: what must hold after `train()`, and on the way."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

import cofiprune
from cofiprune import PruneConfig, PruningCallback
from cofiprune.errors import (
    AdapterError,
    CheckpointError,
    DataError,
    SettingsError,
    TargetError,
    TeacherError,
    TrainingError,
)
from cofiprune.masking import masks_of
from cofiprune.measure.evaluation import evaluate
from processes import launch, outputs
from toy import assert_masked_is_compacted, collate, logits, spans

CHECKPOINTING = "activation_checkpointing"
"""What recent transformers call it."""
if CHECKPOINTING not in TrainingArguments.__dataclass_fields__:
    CHECKPOINTING = "gradient_checkpointing"


def trainer_for(model, rows, folder, callback, *, kind=Trainer, more=(), eval_rows=None, loss=None, **changes):
    settings = {
        "num_train_epochs": 2, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 96,
        "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "report_to": [],
        "disable_tqdm": True, "dataloader_pin_memory": False, "seed": 0,
    }  # fmt: skip
    return kind(
        model, TrainingArguments(str(folder), **{**settings, **changes}), train_dataset=rows, eval_dataset=eval_rows,
        data_collator=collate, callbacks=[callback, *more], compute_loss_func=loss,
    )  # fmt: skip


def check_outcome(toy, callback, model, dense):
    """What must hold after every run."""
    structure = cofiprune.structure(model)
    small = cofiprune.compact(model)
    whole, left = (toy.parameters_of_layers(one, structure) for one in (dense, small))
    assert abs(1 - left / whole - callback.target) <= 0.005
    assert callback.result.sparsity == pytest.approx(1 - left / whole, abs=1e-12)
    masks = masks_of(model)
    assert all(bool(((value == 0) | (value == 1)).all()) for value in masks.values())
    assert masks.plan() == callback.plan == callback.result.plan
    assert_masked_is_compacted(model, small)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert list(model.state_dict()) == list(dense.state_dict())
    return small


def train(toy, folder, callback, model=None, rows=None, **changes):
    """Train the toy's student, or another model, under the callback; return both after a look at the outcome."""
    model = toy.student() if model is None else model
    dense = copy.deepcopy(model)
    trainer = trainer_for(model, toy.rows() if rows is None else rows, folder, callback, **changes)
    trainer.train()
    return trainer, check_outcome(toy, callback, model, dense)


@pytest.mark.parametrize(
    ("target", "settings"),
    [(0.3, {}), (0.6, {"units": ("head", "intermediate")}), (0.9, {"warm_start": False, "freeze_epochs": 0})],
)
def test_the_model_ends_with_hard_masks_of_exactly_the_target(toy, tmp_path, target, settings):
    callback = PruningCallback(target, toy.teacher, **settings)
    _, small = train(toy, tmp_path, callback, save_strategy="steps", save_steps=2)
    small.save_pretrained(tmp_path / "small")
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "small")
    assert torch.equal(logits(again), logits(small))
    # Checkpoints of the Trainer load as the stock model.
    folders = sorted(tmp_path.glob("checkpoint-*"))
    assert len(folders) == 3
    for folder in folders:
        loaded, report = transformers.BertForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        shapes = {name: value.shape for name, value in loaded.state_dict().items()}
        assert shapes == {name: value.shape for name, value in toy.teacher.state_dict().items()}
        assert masks_of(loaded) is None
        assert (folder / "cofiprune" / "meta.json").exists()
    dense, left = callback.result.dense, callback.result.pruned
    assert (dense.parameters, left.parameters) == (toy.teacher.num_parameters(), small.num_parameters())


class Begin(TrainerCallback):
    """What the gates start on."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.plan = masks_of(model).plan()
            self.weights = dict(cofiprune.compact(model, self.plan).named_parameters())


@pytest.mark.parametrize("target", [0.6, 0.9])
def test_gates_start_on_what_one_shot_leaves(toy, watch, tmp_path, target):
    """They start on the model that `prune` starts on, given the same batches in the same order."""
    rows, student, model, batches = toy.rows(96, seed=1), toy.student(), toy.student(), []

    def read(module, args, kwargs):
        batches.append({"labels": torch.zeros(16, dtype=torch.long), **kwargs})

    handle = model.register_forward_pre_hook(read, with_kwargs=True)
    begin, callback = Begin(), PruningCallback(target)
    trainer_for(model, rows, tmp_path, callback, more=[begin]).train()
    handle.remove()
    check_outcome(toy, callback, model, toy.teacher)
    kept = callback.plan.keep
    assert all(set(kept[name]) <= set(begin.plan.keep[name]) for name in kept)  # what is gone stays gone

    steps = watch(student)
    settings = {"target_sparsity": target, "epochs": 1, "finetune_epochs": 0, "method": "cofi", "progress": False}
    cofiprune.prune(student, DataLoader(batches[:6], batch_size=None), **settings)
    assert dict(cofiprune.structure(steps[0].model).sizes) == {n: size for n, size in begin.plan.kept.items() if size}
    bare = cofiprune.compact(toy.student(), begin.plan).state_dict()
    assert all(torch.allclose(value, steps[0].before[name], atol=1e-6) for name, value in begin.weights.items())
    assert any(not torch.allclose(value, bare[name], atol=1e-4) for name, value in begin.weights.items())


@pytest.mark.parametrize("share", [0.75, 0.0])
def test_the_outcome_is_that_of_prune(toy, tmp_path, share):
    """The same start, and the same epochs before and after the structure is decided."""
    rows, held_out, target = toy.rows(96, seed=1), toy.rows(96, seed=2), 0.6
    layout = {"epochs": 6, "freeze_epochs": 0, "finetune_epochs": 3, "batch_size": 16, "one_shot_share": share}
    rates = {"learning_rate": 1e-3, "finetune_learning_rate": 1e-3}
    other = cofiprune.prune(
        toy.student(), rows, target_sparsity=target, teacher=toy.teacher, progress=False, **layout, **rates
    )
    callback = PruningCallback(target, toy.teacher, freeze_epochs=3, one_shot_share=share)
    _, small = train(toy, tmp_path, callback, rows=rows, num_train_epochs=9)
    ours, theirs = (evaluate(one, held_out)["accuracy"] for one in (small, other.compact()))
    assert min(ours, theirs) > 0.9
    assert abs(ours - theirs) < 0.05
    assert abs(callback.result.sparsity - other.sparsity) < 0.005


class Watch(TrainerCallback):
    """At every evaluation: the loss that the Trainer found, and that of a plain copy under the masks of the moment."""

    def __init__(self, rows):
        self.batch = collate(rows)
        self.seen = []

    def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs):
        plain = cofiprune.compact(model).eval()
        with torch.no_grad():
            loss = float(plain(**self.batch).loss)
        self.seen.append((state.global_step, metrics["eval_loss"], loss, masks_of(model).sparsity()))


def test_evaluation_within_training_is_of_the_plain_loss_under_deterministic_gates(toy, tmp_path):
    held_out = toy.rows(48, seed=2)
    watch = Watch(held_out)
    callback = PruningCallback(0.7, toy.teacher, gate_learning_rate=0.3, one_shot_share=0)
    evaluated = {"eval_rows": held_out, "eval_strategy": "steps", "eval_steps": 4}
    trainer, _ = train(
        toy, tmp_path, callback, rows=toy.rows(96, seed=1), more=[watch], num_train_epochs=6, **evaluated
    )
    for _, found, plain, _ in watch.seen:
        assert found == pytest.approx(plain, abs=1e-5)
    sparsities = [sparsity for *_, sparsity in watch.seen]
    assert sparsities[0] < 0.1
    assert any(0.1 < sparsity < 0.6 for sparsity in sparsities)  # on the way
    assert sparsities[-1] == callback.result.sparsity
    # And training went on under samples: its logged loss holds the teacher's part.
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in logged:
        parts = 0.5 * entry["label_loss"] + entry["logits_loss"] + 2 * entry["layers_loss"]
        assert entry["loss"] == pytest.approx(parts, abs=1e-4)


@pytest.mark.parametrize(
    ("share", "begin", "rising", "gated"), [(0.0, 0.0, 0.4, 0.75), (0.75, 1 - 0.5**0.75, 0.25, 0.4)]
)
def test_the_log_says_how_far_pruning_is(toy, tmp_path, share, begin, rising, gated):
    laid_out = {"sparsity_warmup_epochs": 4 * rising, "freeze_epochs": 4 * (1 - gated)}
    callback = PruningCallback(0.5, one_shot_share=share, **laid_out)
    trainer, _ = train(toy, tmp_path, callback, rows=toy.rows(96, seed=1), num_train_epochs=4)
    steps = trainer.state.max_steps
    logged = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    targets = [logged[step]["target_sparsity"] for step in range(1, round(gated * steps))]
    assert targets[0] == pytest.approx(begin, abs=0.02 * bool(share))
    assert targets == sorted(targets)
    assert targets[round(rising * steps)] == pytest.approx(0.5)
    assert all(0 <= logged[step]["expected_sparsity"] <= 1 for step in range(1, round(gated * steps)))
    assert logged[steps]["sparsity"] == callback.result.sparsity
    assert [entry["step"] for entry in callback.history if "loss" in entry] == list(range(1, steps + 1))
    assert {entry["phase"] for entry in callback.history} == {"prune", "recover"}


def test_with_a_teacher_accumulated_batches_are_one_batch(toy, tmp_path):
    """Before the gates start and without dropout, losses that are means over rows are the same to rounding."""
    found = {}
    for size, accumulated in ((16, 1), (8, 2)):
        callback = PruningCallback(0.5, toy.teacher, label_weight=1, distill_layers_weight=0, pre_finetune_epochs=1)
        rows = toy.rows(40, seed=1)  # the last step of an epoch has half a batch
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        model = toy.bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        train(toy, tmp_path, callback, model, rows, **sizes)
        found[size] = [entry["loss"] for entry in callback.history if "loss" in entry]
    assert len(found[8]) == len(found[16]) == 6
    assert found[8][:3] == pytest.approx(found[16][:3], rel=1e-4)


def samples_of(model):
    """The values of the masks in each pass of training: a sample of the gates, or None where they are set."""
    found = []

    def look(module, args, kwargs):
        masks = masks_of(model)
        if masks is not None and torch.is_grad_enabled():
            readings = [masks.read(name) for name in masks]
            bound = any(reading.bound for reading in readings)
            found.append(tuple(torch.cat([reading.value for reading in readings]).tolist()) if bound else None)

    model.bert.register_forward_pre_hook(look, with_kwargs=True)
    return found


def test_accumulated_batches_are_one_step_of_the_gates(toy, tmp_path):
    model = toy.student()
    samples, callback = samples_of(model), PruningCallback(0.5, one_shot_share=0, warm_start=False)
    rows = toy.rows(56, seed=1)  # 7 batches: steps of 3, 3 and 1
    sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 3, "num_train_epochs": 4}
    trainer_for(model, rows, tmp_path, callback, **sizes).train()
    assert len(samples) == 28
    assert None not in samples[:21]
    assert len(set(samples[:21])) == 21  # one for each batch, as long as gates learn
    assert set(samples[21:]) == {None}
    logged = [entry for entry in callback.history if "expected_sparsity" in entry]
    assert [entry["step"] for entry in logged] == list(range(1, 9))


@pytest.mark.parametrize(("stopped_at", "teacher"), [(6, None), (12, "self"), (22, "self")])
def test_a_resumed_run_is_the_uninterrupted_one(toy, tmp_path, stopped_at, teacher):
    def start():
        model, callback = toy.student(), PruningCallback(0.6, teacher)
        settings = {"num_train_epochs": 4, "logging_steps": 5, "save_strategy": "steps", "save_steps": 2}
        return model, callback, trainer_for(model, toy.rows(96, seed=1), tmp_path, callback, **settings)

    model, callback, trainer = start()
    trainer.train()
    resumed, again, other = start()
    other.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stopped_at}"))
    assert again.plan == callback.plan
    assert toy.is_unchanged(resumed, toy.snapshot(model))

    def timeless(entry):
        # The Trainer's own mean begins anew where it resumes; the parts that the callback adds do not.
        return {name: value for name, value in entry.items() if name not in ("loss", "seconds")}

    trained = [[timeless(entry) for entry in one.history if "loss" in entry] for one in (callback, again)]
    assert trained[0] == trained[1]
    assert again.result.seconds > 0


def test_a_teacher_is_followed_where_labels_are_noise(toy, tmp_path):
    rows = toy.rows(96, seed=1)
    noise = torch.randint(2, (96,), generator=torch.Generator().manual_seed(3)).tolist()
    rows = [{**row, "labels": label} for row, label in zip(rows, noise, strict=True)]
    batch = collate(toy.rows(96, seed=2))
    with torch.no_grad():
        wanted = toy.teacher(**batch).logits.log_softmax(-1)
    divergence = {}
    for name, teacher, settings in (("alone", None, {}), ("taught", toy.teacher, {"label_weight": 0})):
        model = toy.student()
        callback = PruningCallback(0.5, teacher, **settings)
        train(toy, tmp_path, callback, model, rows, num_train_epochs=6)
        with torch.no_grad():
            ours = model(**batch).logits.log_softmax(-1)
        divergence[name] = float(torch.nn.functional.kl_div(ours, wanted, log_target=True, reduction="batchmean"))
    assert divergence["taught"] < 0.3 * divergence["alone"]


def test_a_teacher_of_another_size_can_teach(toy, tmp_path):
    train(toy, tmp_path, PruningCallback(0.5, toy.teacher), toy.bert(num_hidden_layers=1, hidden_size=24))


HEADS = [
    ("BertForTokenClassification", lambda ids: {"labels": [-100] + [token % 2 for token in ids[1:]]}),
    ("BertForQuestionAnswering", spans),
    ("BertForMaskedLM", lambda ids: {"labels": [token if token > 20 else -100 for token in ids]}),
    ("BertModel", lambda ids: {}),
]


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize(("cls", "labels"), HEADS, ids=[cls for cls, _ in HEADS])
def test_other_heads_learn_from_a_teacher(toy, tmp_path, cls, labels, accumulated):
    rows = [row for row in toy.rows(200, labels=labels) if len(row["input_ids"]) == 6]
    model = toy.bert(cls)
    dense = copy.deepcopy(model)
    callback = PruningCallback(0.5, "self")
    trainer = trainer_for(
        model, rows, tmp_path, callback, per_device_train_batch_size=4, gradient_accumulation_steps=accumulated
    )
    trainer.data_collator = default_data_collator
    trainer.train()
    inputs = {"input_ids": torch.tensor([row["input_ids"] for row in rows])}
    small, model = cofiprune.compact(model).eval(), model.eval()
    with torch.no_grad():
        if cls != "BertModel":  # whose states lose the removed dimensions
            for ours, theirs in zip(small(**inputs).values(), model(**inputs).values(), strict=True):
                assert torch.allclose(ours, theirs, atol=1e-5)
    structure = cofiprune.structure(dense)
    left = toy.parameters_of_layers(small, structure) / toy.parameters_of_layers(dense, structure)
    assert 1 - left == pytest.approx(0.5, abs=0.005)


def test_bf16_and_gradient_checkpointing_work(toy, tmp_path):
    model = toy.student()
    callback = PruningCallback(0.5, toy.teacher)
    trainer_for(model, toy.rows(), tmp_path, callback, bf16=True, **{CHECKPOINTING: True}).train()
    small = cofiprune.compact(model)
    assert torch.allclose(logits(model), logits(small), atol=0.05)  # both still under the Trainer's autocast
    assert masks_of(model).sparsity() == pytest.approx(0.5, abs=0.005)


@pytest.mark.parametrize("scale", [2.0**10, 2.0**127])
def test_the_scaling_of_a_float16_loss_changes_nothing(toy, tmp_path, scale):
    """On a CPU there is no float16 training, but its scaler works: by powers of two."""
    plans, models, logged = [], [], []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)):
        model = toy.student()
        callback = PruningCallback(0.6, toy.teacher, freeze_epochs=2.4)
        rows = toy.rows(96, seed=1)  # not clipped, since the Trainer unscales only float16 before it clips
        trainer = trainer_for(model, rows, tmp_path, callback, num_train_epochs=4, max_grad_norm=0.0)
        trainer.accelerator.scaler = scaler
        trainer.train()
        check_outcome(toy, callback, model, toy.teacher)
        plans.append(callback.plan)
        models.append(model)
        logged.append([entry for entry in callback.history if "expected_sparsity" in entry])
    first, second = ([entry["expected_sparsity"] for entry in one] for one in logged)
    if scale < 2**100:
        assert plans[0] == plans[1]
        assert toy.is_unchanged(models[1], toy.snapshot(models[0]))
    else:  # the first steps overflow and are left out, by weights and gates alike
        assert second[0] == second[1] == first[0]
        assert second[-1] != second[0]


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-4])
def test_the_trainers_clipping_does_not_stop_the_gates(toy, tmp_path, max_grad_norm):
    callback = PruningCallback(0.5, one_shot_share=0)
    settings = {"num_train_epochs": 6, "learning_rate": 1e-4, "max_grad_norm": max_grad_norm}
    train(toy, tmp_path, callback, rows=toy.rows(96, seed=1), **settings)
    expected = [entry["expected_sparsity"] for entry in callback.history if "expected_sparsity" in entry]
    assert expected[-1] > expected[0] + 0.1


def smoothed(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs["logits"], labels, label_smoothing=0.1)


@pytest.mark.parametrize("how", [{"loss": smoothed}, {"label_smoothing_factor": 0.1}])
def test_without_a_teacher_any_loss_will_do(toy, tmp_path, how):
    train(toy, tmp_path, PruningCallback(0.5), **how)


def test_the_best_model_is_one_with_the_final_structure(toy, tmp_path):
    class Score:
        """Worse and worse, so that the first evaluation would always be the best."""

        calls = 0

        def __call__(self, prediction):
            self.calls += 1
            return {"score": -self.calls}

    model, callback = toy.student(), PruningCallback(0.6, freeze_epochs=2.4)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    evaluated = {"eval_rows": toy.rows(16, seed=2), "num_train_epochs": 4}
    trainer = trainer_for(model, toy.rows(96, seed=1), tmp_path, callback, **best, **steps, **evaluated)
    trainer.compute_metrics = Score()
    trainer.train()
    assert trainer.state.best_global_step == 10  # the first one with the structure of the end
    assert callback.result.best_step == 10
    assert callback.result.metrics["eval_score"] == -5
    check_outcome(toy, callback, model, toy.teacher)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def test_a_run_that_stops_early_is_cut_to_the_target_with_a_warning(toy, tmp_path):
    with pytest.warns(UserWarning, match="stopped after 2 of 6 steps, before the structure was decided"):
        train(toy, tmp_path, PruningCallback(0.5, one_shot_share=0), more=[Stop()])


def test_masks_of_an_earlier_run_are_taken_off_with_a_warning(toy, tmp_path):
    model = toy.student()
    cofiprune.attach(model)["layers.0.ffn"] = [0]
    with pytest.warns(UserWarning, match="masks that were attached"):
        train(toy, tmp_path, PruningCallback(0.5), model)


class Break(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def test_after_an_interruption_the_model_can_be_used_and_trained_again(toy, tmp_path):
    model = toy.student()
    callback = PruningCallback(0.5)
    with pytest.raises(KeyboardInterrupt):
        trainer_for(model, toy.rows(), tmp_path, callback, more=[Break()]).train()
    assert torch.isfinite(logits(model)).all()
    train(toy, tmp_path, callback, model)


def test_a_copy_made_in_training_is_a_model_of_its_own(toy, tmp_path):
    copies = []

    class Copy(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            copies.append(copy.deepcopy(model))

    trainer_for(toy.student(), toy.rows(), tmp_path, PruningCallback(0.5, toy.teacher), more=[Copy()]).train()
    plain = transformers.BertForSequenceClassification(toy.config())
    plain.load_state_dict(copies[0].state_dict())
    masks_of(copies[0]).detach()
    assert torch.equal(logits(copies[0]), logits(plain))
    batch = collate(toy.rows(4))
    copies[0].train()
    assert copies[0](**batch).loss.requires_grad


# Mistakes.


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"target_sparsity": 1.5}, TargetError, "1.5"),
        ({"gate_learning_rat": 1}, SettingsError, "gate_learning_rate"),
        ({"batch_size": 8}, SettingsError, r"TrainingArguments\(per_device_train_batch_size=...\)"),
        ({"finetune_epochs": 1}, SettingsError, "cofiprune.finetune"),
        ({"config": {"units": "head"}}, SettingsError, "PruneConfig"),
    ],
)
def test_wrong_arguments_are_refused_when_the_callback_is_made(arguments, error, says):
    with pytest.raises(error, match=says):
        PruningCallback(**arguments)


def test_settings_of_a_config_that_the_trainer_decides_are_named():
    with pytest.warns(UserWarning, match="batch_size, epochs"):
        callback = PruningCallback(config=PruneConfig(epochs=3, batch_size=4, units="head"))
    assert callback.config.units == ("head",)


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield {"input_ids": [2, 5, 9], "labels": 1}


def own_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    return model(**inputs).logits.square().mean()


class OwnLoss(Trainer):
    compute_loss = own_loss


class Around(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs.pop("labels")
        return model.bert(**inputs).last_hidden_state.square().mean()


def broken(toy):
    model = toy.student()
    with torch.no_grad():
        model.classifier.weight[0, 0] = float("nan")
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch.compile imports
@pytest.mark.parametrize(
    ("arguments", "settings", "error", "says"),
    [
        ({"target_sparsity": 0.6, "units": "head"}, {}, TargetError, "0.6"),
        ({"teacher": "other"}, {}, TeacherError, "self"),
        ({"freeze_epochs": 2}, {}, SettingsError, "none is left in which gates could learn"),
        ({"label_weight": 0, "teacher": "self", "distill_logits_weight": 0, "distill_layers_weight": 0}, {},
         SettingsError, "nothing to learn from"),
        ({}, {"torch_compile": True}, SettingsError, "torch_compile"),
        ({"teacher": "self"}, {"label_smoothing_factor": 0.1}, SettingsError, "label_smoothing_factor"),
        ({}, {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}},
         TrainingError, "use_reentrant"),
        ({"teacher": "self"}, {"kind": OwnLoss}, TrainingError, "another loss than the one that the model returns"),
        ({"teacher": "self"}, {"loss": smoothed}, TrainingError, "compute_loss_func"),
        ({}, {"kind": Around}, TrainingError, "no gradient reached the gates"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_and_nothing_is_changed(toy, tmp_path, arguments, settings, error, says):
    model = toy.student()
    before = toy.snapshot(model)
    trainer = trainer_for(
        model, toy.rows(), tmp_path, PruningCallback(**{"target_sparsity": 0.5, **arguments}), **settings
    )
    with pytest.raises(error, match=says):
        trainer.train()
    assert toy.is_unchanged(model, before)


def test_wrong_models_and_data_are_refused(toy, tmp_path):
    def refused(error, says, model=None, rows=None, teacher=None, **changes):
        rows = toy.rows() if rows is None else rows
        with pytest.raises(error, match=says):
            trainer_for(model or toy.student(), rows, tmp_path, PruningCallback(0.5, teacher), **changes).train()

    refused(TrainingError, "classifier.weight", broken(toy))
    model = toy.student()
    refused(TeacherError, "the student itself", model, teacher=model)
    refused(DataError, "vocabulary of 40", rows=[{"input_ids": [2, 99], "labels": 1}] * 4)
    refused(SettingsError, "warm_start", rows=Endless(), max_steps=2)

    class NotAModel(torch.nn.Linear):
        def forward(self, input_ids=None, attention_mask=None, labels=None):
            return {"loss": super().forward(input_ids.float()[:, :4]).mean()}

    refused(AdapterError, "transformers model", NotAModel(4, 2))


def test_an_endless_data_set_works_without_a_look_at_it(toy, tmp_path):
    train(toy, tmp_path, PruningCallback(0.5, warm_start=False, one_shot_share=0), rows=Endless(), max_steps=8)


def test_a_loss_that_is_not_a_number_stops_the_run(toy, tmp_path):
    def explode(outputs, labels, num_items_in_batch=None):
        return outputs["logits"].mean() * float("nan")

    with pytest.raises(TrainingError, match="not a number at step 1"):
        trainer_for(toy.student(), toy.rows(), tmp_path, PruningCallback(0.5), loss=explode).train()


def test_a_checkpoint_of_another_run_is_refused(toy, tmp_path):
    def trainer(target=0.6, **settings):
        callback = PruningCallback(target, **settings)
        return trainer_for(toy.student(), toy.rows(), tmp_path, callback, save_strategy="steps", save_steps=2)

    def refused(says, run):
        with pytest.raises(CheckpointError, match=says):
            run.train(resume_from_checkpoint=True)

    trainer().train()
    last = tmp_path / "checkpoint-6"
    refused("target_sparsity is 0.6, asked for 0.5", trainer(0.5))
    refused("gate_learning_rate", trainer(gate_learning_rate=0.1))
    shutil.rmtree(last / "cofiprune")
    shutil.copytree(tmp_path / "checkpoint-4" / "cofiprune", last / "cofiprune")
    refused("other weights", trainer())
    for name in ("state.pt", "meta.json"):
        (last / "cofiprune" / name).write_bytes((last / "cofiprune" / name).read_bytes()[:100])
        refused(f"damaged: {name}", trainer())
    (last / "cofiprune" / "meta.json").unlink()
    refused("the gates of that step are missing", trainer())


WORKER = """
import json, os
import cofiprune, toy
_, tests, folder, taught = sys.argv
sys.path.insert(0, tests)
from test_pruning_callback import samples_of, trainer_for

callback = cofiprune.PruningCallback(0.6, "self" if taught == "taught" else None, freeze_epochs=1)
model = toy.bert()
samples = samples_of(model)
trainer = trainer_for(
    model, toy.rows(48), folder, callback, per_device_train_batch_size=8,
    gradient_accumulation_steps=2, num_train_epochs=3, **({"ddp_backend": "gloo"} if "RANK" in os.environ else {}),
)
trainer.train()
report = {
    "processes": trainer.args.world_size,
    "gates": samples,
    "weights": sum(value.double().abs().sum().item() for value in model.state_dict().values()),
    "plan": callback.plan.to_dict(),
    "sparsity": cofiprune.masking.masks_of(model).sparsity(),
    "loss": [entry["loss"] for entry in callback.history if "loss" in entry],
}
print("REPORT" + json.dumps(report))
"""


def in_processes(count, folder, taught):
    """Run the worker in some processes that train together; their reports."""
    texts = outputs(launch(WORKER, str(Path(__file__).parent), str(folder / "out"), taught, processes=count))
    lines = [next(line for line in text.splitlines() if line.startswith("REPORT")) for text in texts]
    return [json.loads(line.removeprefix("REPORT")) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("taught", ["taught", "alone"])
def test_two_processes_keep_the_same_gates(tmp_path, taught):
    first, second = in_processes(2, tmp_path, taught)
    assert first["processes"] == second["processes"] == 2
    for name in ("gates", "weights", "plan"):
        assert first[name] == second[name]
    assert len({tuple(sample) for sample in first["gates"] if sample is not None}) > 3
    assert first["sparsity"] == pytest.approx(0.6, abs=0.005)
    if taught == "taught":
        (alone,) = in_processes(1, tmp_path, taught)  # half as many rows per step, the same mean
        assert first["loss"][0] == pytest.approx(alone["loss"][0], rel=0.4)

"""Wrong use ends in an error that says what was asked, what was found and what is possible, and changes nothing."""

import numpy as np
import pytest
import torch
import transformers
from torch.utils.data import DataLoader, IterableDataset

import cofiprune
from cofiprune.errors import (
    CheckpointError,
    CofipruneError,
    DataError,
    SettingsError,
    TargetError,
    TeacherError,
    TrainingError,
)
from cofiprune.masking import masks_of
from small import assert_no_trace, trace

QUICK = {"epochs": 1, "finetune_epochs": 1, "batch_size": 16, "progress": False}


def state_of(model):
    return {name: value for name, value in trace(model).items() if "random" not in name}


class Stream(IterableDataset):
    def __iter__(self):
        yield {"input_ids": [2, 5], "labels": 1}


def change(**new):
    """Replace columns of the last row."""
    return lambda rows: [*rows[:-1], {**rows[-1], **new}]


def without(*names):
    return lambda rows: [{name: value for name, value in row.items() if name not in names} for row in rows]


# name: (arguments on top of a run that works, the error, words of the message)
PRUNE = {
    "a percentage": ({"target_sparsity": 95}, TargetError, ["95", "(0, 1)", "target_sparsity=0.95"]),
    "an unknown unit": ({"units": ("heads",)}, SettingsError, ["'heads'", "'head'", "intermediate"]),
    "out of reach": ({"target_sparsity": 0.9, "units": "head"}, TargetError, ["0.9", "head", "removing all"]),
    "between two steps": (
        {"target_sparsity": 0.25, "units": "layer"}, TargetError, ["0.25", "reachable next to it", "0.2035", "0.2965"]),
}  # fmt: skip
COMMON = {
    "an unknown setting": ({"epoch": 3}, SettingsError, ["'epoch'", "'epochs'"]),
    "a value out of range": ({"epochs": -1}, SettingsError, ["epochs=-1", "greater than or equal to 0"]),
    "a config of another kind": ({"config": {"epochs": 3}}, SettingsError, ["PruneConfig", "dict"]),
    "a teacher by name": ({"teacher": "bert-base"}, TeacherError, ["'bert-base'", '"self"']),
    "a teacher that is none": ({"teacher": 3}, TeacherError, ["int", '"self"']),
    "no labels and no teacher": (
        {"train_dataset": without("labels"), "label_weight": 1}, DataError, ["labels"]),
    "labels of weight 0 and no teacher": ({"label_weight": 0}, SettingsError, ["label_weight=0", "teacher"]),
    "nothing to learn from": (
        {"teacher": "self", "label_weight": 0, "distill_logits_weight": 0, "distill_layers_weight": 0}, SettingsError,
        ["nothing to learn from", "distill_logits_weight"]),
    "labels asked for": (
        {"teacher": "self", "label_weight": 1, "train_dataset": without("labels")}, DataError,
        ["label_weight=1", "none"]),
    "no rows": ({"train_dataset": []}, DataError, ["train_dataset", "no rows"]),
    "a dict of columns": ({"train_dataset": {"input_ids": [[1]]}}, DataError, ["train_dataset", "dict", "rows"]),
    "a stream": ({"train_dataset": Stream()}, SettingsError, ["train_dataset", "length", "max_steps"]),
    "a loader of a stream": ({"train_dataset": DataLoader(Stream())}, DataError, ["train_dataset", "length"]),
    "a token out of range": (
        {"train_dataset": change(input_ids=[2, 99])}, DataError, ["row 47", "99", "vocabulary of 40"]),
    "a label out of range": ({"train_dataset": change(labels=2)}, DataError, ["row 47", "label 2", "0 to 1"]),
    "an evaluation label out of range": (
        {"eval_dataset": change(labels=5)}, DataError, ["eval_dataset", "row 47", "label 5"]),
    "an evaluation of nothing": (
        {"eval_dataset": without("labels"), "teacher": "self"}, DataError,
        ["eval_dataset", "nothing to measure", "compute_metrics"]),
    "a metric without a set": (
        {"metric_for_best_model": "accuracy"}, SettingsError, ["metric_for_best_model", "eval_dataset"]),
    "an unknown metric": (
        {"metric_for_best_model": "acuracy", "eval_dataset": lambda rows: rows}, SettingsError,
        ["'acuracy'", "'accuracy'", "loss"]),
    "resume from nowhere": ({"resume": True}, SettingsError, ["resume=True", "output_dir"]),
    "callbacks that cannot be called": ({"callbacks": ["print"]}, SettingsError, ["callbacks", "'print'"]),
}  # fmt: skip
CASES = [("prune", name) for name in (*PRUNE, *COMMON)] + [("finetune", name) for name in COMMON]


@pytest.mark.parametrize(("run", "name"), CASES, ids=lambda value: value)
def test_wrong_arguments(toy, run, name):
    arguments, error, words = {**PRUNE, **COMMON}[name]
    rows = toy.rows(48)
    arguments = {"train_dataset": rows, **QUICK, **arguments}
    for key in ("train_dataset", "eval_dataset"):
        if callable(arguments.get(key)):
            arguments[key] = arguments[key](rows)
    if run == "prune":
        arguments = {"target_sparsity": 0.5, **arguments}
    student = toy.student().train()
    student.bert.embeddings.eval()
    before = state_of(student)
    with pytest.raises(CofipruneError) as caught:
        getattr(cofiprune, run)(student, **arguments)
    assert type(caught.value) is error, caught.value
    for word in words:
        assert word in str(caught.value)
    assert_no_trace(student, before)


def refused(model, rows, error, *words, run="prune", **arguments):
    """Run, and check the error and that the model is as it was."""
    before = state_of(model)
    goal = {"target_sparsity": 0.5} if run == "prune" else {}
    with pytest.raises(error) as caught:
        getattr(cofiprune, run)(model, rows, **{**QUICK, **goal, **arguments})
    assert isinstance(caught.value, CofipruneError)
    for word in words:
        assert word in str(caught.value), caught.value
    assert_no_trace(model, before)


@pytest.mark.parametrize("run", ["prune", "finetune"])
def test_teachers_that_cannot_teach(toy, run):
    rows = toy.rows(48)

    def tried(teacher, *words, model=None, rows=rows, **arguments):
        before = state_of(teacher)
        refused(model or toy.student(), rows, TeacherError, *words, run=run, teacher=teacher, **arguments)
        assert_no_trace(teacher, before)

    tried(toy.bert(vocab_size=41), "vocabulary", "41", "40")
    tried(toy.bert(num_labels=3), "labels", "3", "2")
    tried(toy.bert("BertForTokenClassification"), "BertForTokenClassification", "BertForSequenceClassification")
    tried(toy.bert("BertForQuestionAnswering"), "BertForQuestionAnswering")
    tried(toy.bert(max_position_embeddings=8).train(), "train_dataset", "reads at most 8")
    typed = [{**row, "token_type_ids": [1] * len(row["input_ids"])} for row in rows]
    tried(toy.bert(type_vocab_size=1), "train_dataset", "token type 1", rows=typed)
    unlabelled = [{"input_ids": row["input_ids"]} for row in rows]
    tried(toy.bert("BertModel"), "no head", rows=unlabelled)
    broken = toy.bert()
    with torch.no_grad():
        broken.classifier.bias[0] = float("nan")
    tried(broken, "the teacher", "classifier.bias")

    student = toy.student()
    refused(student, rows, TeacherError, "student itself", '"self"', run=run, teacher=student)
    shared = toy.bert()
    shared.bert = student.bert
    refused(student, rows, TeacherError, "shares", "embeddings", run=run, teacher=shared)


def test_an_encoder_of_another_width_learns_from_similarities(toy):
    rows = [{"input_ids": row["input_ids"]} for row in toy.rows(16)]
    model = toy.bert("BertModel")
    refused(model, rows, DataError, "no head", "teacher", method="cofi")
    settings = {"distill_layers_weight": 0, "units": "hidden", "logging_steps": 1, **QUICK}
    result = cofiprune.prune(model, rows, target_sparsity=0.4826, **settings)
    assert result.compact().config.hidden_size == 16 > len(result.plan.keep["hidden"])
    assert result.history[-1]["logits_loss"] > 0
    assert "layers_loss" not in result.history[-1]


@pytest.mark.parametrize("run", ["prune", "finetune"])
def test_weights_that_cannot_be_trained(toy, run):
    rows = toy.rows(16)
    broken = toy.student()
    with torch.no_grad():
        broken.bert.pooler.dense.bias[3] = float("inf")
    refused(broken, rows, TrainingError, "bert.pooler.dense.bias", "finite", run=run)
    refused(toy.student().half(), rows, TrainingError, "float16", "float()", "mixed_precision", run=run)
    with torch.device("meta"):
        empty = transformers.BertForSequenceClassification(toy.config())
    goal = {"target_sparsity": 0.5} if run == "prune" else {}
    with pytest.raises(TrainingError, match="meta device"):
        getattr(cofiprune, run)(empty, rows, **goal)
    with torch.inference_mode():
        fixed = transformers.BertForSequenceClassification(toy.config())
    with pytest.raises(TrainingError, match=r"was made under torch.inference_mode\(\)"):
        getattr(cofiprune, run)(fixed, rows, **goal)
    if run == "finetune":
        frozen = toy.student()
        frozen.requires_grad_(False)
        refused(frozen, rows, TrainingError, "frozen", run=run)
        refused(toy.student(), rows, SettingsError, "epochs=0", run=run, epochs=0)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_training_needs_no_gradients_from_outside(toy, off):
    model, before = toy.student(), toy.student().state_dict()
    with off():
        result = cofiprune.finetune(model, toy.rows(16), epochs=1, batch_size=8, progress=False)
        assert not torch.is_grad_enabled()
    assert not torch.equal(result.model.state_dict()["classifier.weight"], before["classifier.weight"])
    assert all(value.requires_grad and not value.is_inference() for value in model.parameters())


def test_precision_that_this_machine_does_not_have(toy):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    refused(toy.student(), toy.rows(16), SettingsError, "fp16", "GPU", "bf16", mixed_precision="fp16")


def test_output_folders_that_cannot_be_used(toy, tmp_path):
    rows = toy.rows(16)
    file = tmp_path / "file"
    file.write_text("")
    refused(toy.student(), rows, SettingsError, "file", "folder", output_dir=file)
    refused(toy.student(), rows, CheckpointError, "nothing to resume", output_dir=tmp_path / "new", resume=True)
    folder = tmp_path / "a" / "b"
    cofiprune.prune(toy.student(), rows, target_sparsity=0.5, output_dir=folder, **QUICK)
    assert (folder / "plan.json").exists()
    refused(toy.student(), rows, CheckpointError, "earlier run", "resume=True", output_dir=folder)
    again = {"output_dir": folder, "resume": True}
    refused(toy.student(), rows, CheckpointError, "target_sparsity", "0.5", "0.6", target_sparsity=0.6, **again)
    refused(toy.student(), rows, CheckpointError, "learning_rate", "0.25", learning_rate=0.25, **again)
    refused(toy.student(), rows, CheckpointError, "units", "intermediate", units="intermediate", **again)
    refused(toy.student(), rows, CheckpointError, "teacher", "'self'", teacher="self", **again)
    refused(toy.student(), toy.rows(64), CheckpointError, "rows", **again)
    refused(toy.bert(num_hidden_layers=3), rows, CheckpointError, "another model", **again)
    refused(toy.student(), rows, CheckpointError, "method", "prune", run="finetune", **again)
    # The same structure, but another head.
    tokens = toy.rows(16, labels=lambda ids: {"labels": [0] * len(ids)})
    refused(toy.bert("BertForTokenClassification"), tokens, CheckpointError, "model", **again)


def test_a_run_that_is_refused_leaves_the_masks_of_an_earlier_one(toy):
    model = toy.student()
    masks = cofiprune.attach(model)
    for settings, error in (({"target_sparsity": 5}, TargetError), ({"label_weight": 0}, SettingsError)):
        with pytest.raises(error):
            cofiprune.prune(model, toy.rows(8), **{"target_sparsity": 0.5, **QUICK, **settings})
    assert masks_of(model) is masks


def test_errors_in_the_middle_of_a_run_take_the_masks_off(toy):
    def broken(entry):
        raise ZeroDivisionError

    for phase in ("prune", "recover"):
        student = toy.student().train()
        called = broken if phase == "prune" else lambda entry: entry["phase"] == "recover" and broken(entry)
        with pytest.raises(ZeroDivisionError):
            cofiprune.prune(student, toy.rows(16), target_sparsity=0.5, callbacks=[called], logging_steps=1, **QUICK)
        assert masks_of(student) is None
        assert student.training
        assert not any("forward" in vars(module) for module in student.modules())
        assert all(parameter.requires_grad for parameter in student.parameters())
        student(torch.tensor([[2, 5, 7]]))


def test_without_data(toy):
    rows = toy.rows(8)
    refused(toy.student(), None, SettingsError, "resume=True", "train_dataset", resume=True, output_dir="missing")
    refused(toy.student(), None, DataError, "eval_dataset", "row 7", eval_dataset=change(labels=9)(rows))
    refused(toy.student(), None, SettingsError, "train_dataset", run="finetune")


def test_targets_from_numpy_are_numbers(toy):
    result = cofiprune.prune(toy.student(), toy.rows(16), target_sparsity=np.float32(0.5), **QUICK)
    assert abs(result.sparsity - 0.5) <= 0.005


def test_units_that_are_not_there_any_more(toy):
    def left(*kinds):
        structure = cofiprune.structure(toy.teacher)
        gone = {name: torch.zeros(group.size) for name, group in structure.items() if group.kind in kinds}
        return cofiprune.compact(toy.student(), cofiprune.Plan.from_values(structure, gone))

    refused(left("attention"), toy.rows(16), CofipruneError, "'head'", "no such units are left", units="head")
    refused(left("attention", "ffn"), toy.rows(16), TargetError, "nothing is left")

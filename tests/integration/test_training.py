"""`prune` and `finetune` on a task that a toy model learns: what must hold after a run, whatever it was given."""

import copy
import itertools
import math

import pytest
import torch
from torch.utils.data import DataLoader

import cofiprune
from cofiprune.accounting import layer_parameters
from cofiprune.masking import masks_of
from cofiprune.measure.evaluation import evaluate
from cofiprune.selection.reachable import reachable
from cofiprune.structure import UNIT_KINDS
from small import build
from toy import INPUTS, assert_masked_is_compacted, collate, logits, spans, with_checkpointing

CHOICES = [choice for size in range(1, 5) for choice in itertools.combinations(UNIT_KINDS, size)]
BRIEF = {"epochs": 2, "finetune_epochs": 1, "batch_size": 16, "progress": False, "seed": 0}


def check_laws(toy, result, target, dense, inputs=INPUTS):
    """What must hold after every run of `prune`."""
    model = result.model
    structure = cofiprune.structure(model)
    whole = toy.parameters_of_layers(dense, cofiprune.structure(dense))
    small = result.compact()
    left = toy.parameters_of_layers(small, structure)
    assert abs(result.sparsity - target) <= 0.005
    assert result.sparsity == pytest.approx(1 - left / whole, abs=1e-12)
    everything = [sum(p.numel() for p in m.parameters()) for m in (dense, small)]
    assert result.model_sparsity == pytest.approx(1 - everything[1] / everything[0], abs=1e-12)
    assert masks_of(small) is None
    assert masks_of(model) is not None
    assert cofiprune.Plan.from_masks(masks_of(model)).keep == result.plan.keep
    assert_masked_is_compacted(model, small, inputs)
    for entry in result.history:
        assert {"phase", "step", "epoch", "seconds"} <= entry.keys()
        assert all(math.isfinite(value) for value in entry.values() if isinstance(value, float)), entry


def run(toy, target=0.5, student=None, rows=None, **settings):
    """Prune the toy's student, or another one, by the brief settings or others; the laws hold."""
    student = toy.student() if student is None else student
    dense = copy.deepcopy(student)
    rows = toy.rows(32) if rows is None else rows
    result = cofiprune.prune(student, rows, target_sparsity=target, **{**BRIEF, **settings})
    assert result.model is student
    check_laws(toy, result, target, dense)
    return result


def test_a_pruned_model_keeps_what_its_teacher_knows(toy):
    held_out = toy.rows(96, seed=2)
    assert evaluate(toy.teacher, held_out)["accuracy"] > 0.95
    settings = {"teacher": toy.teacher, "eval_dataset": held_out, "epochs": 6, "finetune_epochs": 3}
    result = run(toy, 0.6, rows=toy.rows(96, seed=1), **settings)
    assert result.metrics["eval_accuracy"] > 0.9
    for model in (result.model, result.compact()):
        assert evaluate(model, held_out)["accuracy"] == pytest.approx(result.metrics["eval_accuracy"])
    for text in (repr(result), result._repr_html_()):
        assert "PruneResult" in text
        assert f"{result.sparsity:.4f}" in text


def next_words(ids):
    return {"labels": [token if index % 3 == 1 else -100 for index, token in enumerate(ids)]}


HEADS = {
    "sequence classification": ("ForSequenceClassification", {"num_labels": 3}, lambda ids: {"labels": len(ids) % 3}),
    "token classification": ("ForTokenClassification", {"num_labels": 3}, lambda ids: {"labels": [i % 3 for i in ids]}),
    "question answering": ("ForQuestionAnswering", {}, spans),
    "regression": ("ForSequenceClassification", {"num_labels": 1}, lambda ids: {"labels": len(ids) / 10}),
    "several numbers": (
        "ForSequenceClassification", {"num_labels": 2, "problem_type": "regression"},
        lambda ids: {"labels": [len(ids) / 10, 0.5]}),
    "multi-label": ("ForSequenceClassification", {"num_labels": 3}, lambda ids: {"labels": [1.0, 0.0, len(ids) % 2]}),
    "masked language model": ("ForMaskedLM", {}, next_words),
    "next sentence": ("ForNextSentencePrediction", {}, lambda ids: {"labels": len(ids) % 2}),
    "pre-training": ("ForPreTraining", {}, lambda ids: {**next_words(ids), "next_sentence_label": len(ids) % 2}),
    "encoder": ("Model", {}, lambda ids: {}),
}  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("labels", ["labels", "no labels"])
def test_every_head_can_be_pruned(toy, head, labels):
    cls, settings, label = HEADS[head]
    model = toy.bert(f"Bert{cls}", **settings)
    rows = toy.rows(32, labels=label if labels == "labels" else lambda ids: {})
    result = run(toy, student=model, rows=rows, teacher="self")
    logged = [entry for entry in result.history if "loss" in entry]
    labelled = labels == "labels" and head != "encoder"
    assert all(("label_loss" in entry) == labelled for entry in logged)
    assert all("layers_loss" in entry for entry in logged)
    assert all("logits_loss" in entry for entry in logged if entry["phase"] == "prune")
    if cls == "ForMaskedLM":
        for one in (model, result.compact()):
            assert one.cls.predictions.decoder.weight is one.bert.embeddings.word_embeddings.weight


def test_multiple_choice_can_be_pruned(toy):
    model = toy.bert("BertForMultipleChoice")
    dense = copy.deepcopy(model)
    rows = [
        {"input_ids": [row["input_ids"], other["input_ids"], [2, 7]], "labels": index % 3}
        for index, (row, other) in enumerate(itertools.pairwise(toy.rows(32)))
    ]
    result = cofiprune.prune(model, rows, target_sparsity=0.5, teacher="self", eval_dataset=rows[:8], **BRIEF)
    check_laws(toy, result, 0.5, dense, {name: value.unsqueeze(0) for name, value in INPUTS.items()})
    assert 0 <= result.metrics["eval_accuracy"] <= 1


@pytest.mark.parametrize("units", CHOICES, ids=" ".join)
def test_every_choice_of_units_reaches_its_target_or_says_what_it_can_reach(toy, units):
    model = toy.bert()
    structure = cofiprune.structure(model)
    found = reachable(structure, layer_parameters(structure), units)
    targets = {"half": found.highest / 2, "highest": min(found.highest, 0.999)}
    if not found.fine:
        before = toy.snapshot(model)
        with pytest.raises(cofiprune.CofipruneError, match="reachable next to it"):
            cofiprune.prune(model, toy.rows(16), target_sparsity=widest_gap(found.levels), units=units, **BRIEF)
        assert toy.is_unchanged(model, before)
        assert masks_of(model) is None
        targets["half"] = min(found.levels, key=lambda level: abs(level - found.highest / 2))
    for target in targets.values():
        result = run(toy, target, copy.deepcopy(model), toy.rows(16), units=units, teacher="self")
        allowed = {group.name for group in structure.select(units)}
        for name, group in structure.items():
            block_is_gone = name.startswith("layers.") and not result.plan.keep[name]
            assert name in allowed or len(result.plan.keep[name]) == group.size or block_is_gone


def widest_gap(levels):
    """The middle between the two neighbouring levels that lie furthest apart."""
    low, high = max(itertools.pairwise(levels), key=lambda pair: pair[1] - pair[0])
    return (low + high) / 2


TEACHERS = {
    "self": lambda toy: "self",
    "none": lambda toy: None,
    "deeper": lambda toy: toy.bert(seed=3, num_hidden_layers=5),
    "shallower": lambda toy: toy.bert(seed=3, num_hidden_layers=1),
    "wider": lambda toy: toy.bert(seed=3, hidden_size=24),
    "compacted": lambda toy: cofiprune.compact(toy.teacher, half_of(toy.teacher)),
    "of another family": lambda toy: build(
        "DistilBertForSequenceClassification", dtype=torch.float32, hidden_size=16, max_position_embeddings=16
    ),
}
MATCHES = {"self": ["ordered"], "none": ["ordered"], "of another family": ["nearest"]}


@pytest.mark.parametrize(
    ("kind", "match"),
    [(kind, match) for kind in TEACHERS for match in MATCHES.get(kind, ["nearest", "ordered", "same-index"])],
)
def test_teachers(toy, kind, match):
    teacher = TEACHERS[kind](toy)
    before = toy.snapshot(teacher) if isinstance(teacher, torch.nn.Module) else None
    rows = [{**row, "token_type_ids": [0] * len(row["input_ids"])} for row in toy.rows(32)]  # DistilBERT reads none
    result = run(toy, rows=rows, teacher=teacher, distill_layers=3, distill_layer_match=match, logging_steps=1)
    losses = [entry.get("layers_loss", 0.0) for entry in result.history if "loss" in entry]
    assert all(loss > 0 for loss in losses) == (kind != "none")
    if before is not None:
        assert toy.is_unchanged(teacher, before)


def half_of(model):
    """A plan with fewer hidden dimensions, heads and feed-forward dimensions, and a layer less."""
    structure = cofiprune.structure(model)
    values = {name: torch.ones(group.size) for name, group in structure.items()}
    values["hidden"][::3] = 0
    for name, value in values.items():
        if name.endswith((".heads", ".intermediate")):
            value[::2] = 0
        if name in ("layers.0.attention", "layers.0.ffn"):
            value.zero_()
    return cofiprune.Plan.from_values(structure, values)


def test_the_teacher_is_handed_back_in_the_mode_it_came_in(toy):
    teacher = copy.deepcopy(toy.teacher).train()
    teacher.bert.encoder.layer[0].eval()
    modes = [module.training for module in teacher.modules()]
    run(toy, teacher=teacher)
    assert [module.training for module in teacher.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())


def test_modes_and_flags_of_the_model_are_handed_back(toy):
    student = toy.student().train()
    student.bert.embeddings.eval()
    student.classifier.bias.requires_grad_(False)
    modes = [module.training for module in student.modules()]
    flags = [parameter.requires_grad for parameter in student.parameters()]
    for how, settings in ((cofiprune.prune, {"target_sparsity": 0.5}), (cofiprune.finetune, {})):
        how(student, toy.rows(32), teacher="self", eval_dataset=toy.rows(8), **settings, **BRIEF)
        assert [module.training for module in student.modules()] == modes
        assert [parameter.requires_grad for parameter in student.parameters()] == flags


def test_what_the_user_froze_does_not_learn(toy):
    student = toy.student()
    frozen = dict(student.bert.encoder.layer[0].named_parameters(prefix="bert.encoder.layer.0"))
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    before = toy.snapshot(student)
    cofiprune.finetune(student, toy.rows(32), epochs=1, learning_rate=1e-2, progress=False)
    after = toy.snapshot(student)
    assert all(torch.equal(after[name], before[name]) for name in frozen)
    assert not torch.equal(after["classifier.weight"], before["classifier.weight"])
    run(toy, student=student, units="intermediate")
    assert not any(parameter.requires_grad for parameter in frozen.values())


def test_a_wholly_frozen_model_still_learns_its_structure(toy):
    student = toy.student()
    student.requires_grad_(False)
    run(toy, student=student, finetune_epochs=0, freeze_epochs=0)
    assert toy.is_unchanged(student, toy.snapshot(toy.teacher))


@pytest.mark.parametrize("train", [True, False, None])
def test_embeddings_learn_only_when_asked(toy, train):
    def learned(model):
        table = "bert.embeddings.word_embeddings.weight"
        return not torch.equal(model.state_dict()[table], toy.teacher.state_dict()[table])

    student = toy.student()
    cofiprune.finetune(student, toy.rows(32), epochs=1, learning_rate=1e-2, train_embeddings=train, progress=False)
    assert learned(student) == (train is not False)  # None: in `finetune` of a dense model
    settings = {"units": "intermediate", "one_shot_share": 0, "learning_rate": 1e-3}
    assert learned(run(toy, 0.2, train_embeddings=train, **settings).model) == (train is True)


def test_accumulated_gradients_are_those_of_a_larger_batch(toy):
    finals = []
    for size, steps in ((4, 2), (8, 1)):
        model = toy.bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double()
        loader = DataLoader(toy.rows(32), batch_size=size, collate_fn=collate)
        cofiprune.finetune(
            model, loader, epochs=2, gradient_accumulation_steps=steps, learning_rate=1e-3, progress=False
        )
        finals.append(toy.snapshot(model))
    assert max((finals[0][name] - finals[1][name]).abs().max() for name in finals[0]) < 1e-9


def test_accumulation_over_the_end_of_an_epoch_counts_its_steps(toy):
    settings = {"batch_size": 8, "gradient_accumulation_steps": 2, "logging_steps": 1}
    result = run(toy, rows=toy.rows(40), **settings)
    # 5 batches an epoch are 3 steps: 2 of two batches, 1 of one.
    assert [entry["step"] for entry in result.history] == list(range(10))  # 0 is the one-shot start
    assert result.history[-1]["epoch"] == 3


@pytest.mark.parametrize("teacher", [None, "self"])
def test_bf16(toy, teacher):
    result = run(toy, teacher=teacher, mixed_precision="bf16", eval_dataset=toy.rows(8))
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}
    assert "forward" not in vars(result.model)  # nothing of the precision's own is left on the model


def test_batches_may_come_from_a_loader_or_a_collator(toy):
    loader = DataLoader(toy.rows(32), batch_size=16, shuffle=True, collate_fn=collate)
    for rows, settings in ((loader, {}), (toy.rows(32), {"data_collator": collate})):
        assert run(toy, rows=rows, teacher=toy.teacher, **settings).history[-1]["step"] == 6


def test_history_and_callbacks(toy):
    seen = []
    rows, held_out = toy.rows(64), toy.rows(16, seed=2)
    layout = {"epochs": 3, "finetune_epochs": 1, "freeze_epochs": 1, "logging_steps": 3, "eval_steps": 4}
    result = run(toy, rows=rows, teacher="self", eval_dataset=held_out, callbacks=[seen.append], **layout)
    assert seen == result.history
    seen[0]["phase"] = "changed"
    assert result.history[0]["phase"] == "one-shot"
    losses = [entry for entry in result.history if "loss" in entry]
    evaluated = [entry for entry in result.history if "eval_accuracy" in entry]
    assert [entry["step"] for entry in losses] == [3, 6, 8, 9, 12, 15, 16]
    assert [entry["step"] for entry in evaluated] == [0, 4, 8, 12, 16]
    assert 0 < evaluated[0]["sparsity"] < 0.5
    assert [entry["phase"] for entry in losses] == ["prune"] * 3 + ["recover"] * 4
    assert all({"expected_sparsity", "target_sparsity", "constraint"} <= entry.keys() for entry in losses[:3])
    assert losses[2]["target_sparsity"] == pytest.approx(0.5)
    assert all("expected_sparsity" not in entry for entry in losses[3:])
    assert all("sparsity" in entry for entry in evaluated[:3])
    assert [entry["epoch"] for entry in evaluated] == [0, 1, 2, 3, 4]
    assert result.metrics == {name: value for name, value in evaluated[-1].items() if name.startswith("eval_")}
    assert result.seconds > 0


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_and_nowhere_else(toy, terminal, monkeypatch, capfd):
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TERM"):
        monkeypatch.delenv(name, raising=False)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "100")
    run(toy, eval_dataset=toy.rows(8), progress=True, logging_steps=1, method="cofi")
    out, shown = capfd.readouterr()
    assert out == ""
    assert all((word in shown) == terminal for word in ("prune", "recover", "loss", "sparsity", "/0.50", "accuracy")), (
        shown
    )


def test_without_data_the_rest_of_the_arguments_still_counts(toy, tmp_path):
    held_out = toy.rows(32, seed=2)
    student = toy.student()
    with pytest.warns(UserWarning, match="without data"):
        result = cofiprune.prune(
            student, target_sparsity=0.3, teacher="self", eval_dataset=held_out, output_dir=tmp_path / "new"
        )
    check_laws(toy, result, 0.3, toy.teacher)
    assert result.metrics["eval_accuracy"] == evaluate(student, held_out)["accuracy"]
    assert cofiprune.Plan.load(tmp_path / "new" / "plan.json") == result.plan


class Scripted:
    """Metrics that say which evaluation is the best, and the predictions that each was made from."""

    def __init__(self, values):
        self.values = iter(values)
        self.predictions = []

    def __call__(self, prediction):
        self.predictions.append(torch.from_numpy(prediction.predictions).clone())
        return {"score": next(self.values)}


@pytest.mark.parametrize(
    ("metric", "greater", "best"),
    [("score", None, 5), ("eval_score", None, 5), ("score", False, 4), ("loss", None, None)],
)
def test_the_weights_of_the_best_evaluation_are_kept(toy, metric, greater, best):
    held_out = toy.rows(16, seed=2)
    # The first looks whether there is such a metric, the second is of the dense model; then one of the one-shot start,
    # two of the pruning phase and four of the recovery.
    script = Scripted([0.0, 9.0, 9.0, 9.0, 9.0, 0.1, 0.3, math.nan, 0.2])
    asked = {"metric_for_best_model": metric, "greater_is_better": greater, "compute_metrics": script}
    settings = {**BRIEF, **asked, "freeze_epochs": 0, "finetune_epochs": 4, "finetune_learning_rate": 1e-2}
    result = cofiprune.prune(toy.student(), toy.rows(32), target_sparsity=0.5, eval_dataset=held_out, **settings)
    evaluated = [entry for entry in result.history if "eval_score" in entry]
    assert len(evaluated) == 7
    if best is None:
        best = min(range(3, 7), key=lambda index: evaluated[index]["eval_loss"]) + 1
    assert result.best_step == evaluated[best - 1]["step"]
    assert f"of step {result.best_step}" in repr(result)
    again = Scripted([0.0])
    evaluate(result.model, held_out, compute_metrics=again, batch_size=128)
    assert (again.predictions[0] - script.predictions[best + 1]).abs().max() < 1e-5
    assert result.metrics["eval_loss"] == evaluated[best - 1]["eval_loss"]


def test_without_recovery_the_metrics_are_those_of_the_final_plan(toy):
    held_out = toy.rows(32, seed=2)
    result = run(toy, 0.7, teacher="self", eval_dataset=held_out, finetune_epochs=0, freeze_epochs=0)
    assert result.plan.scale  # gates that have not settled stay in the masks, and are folded in by compact
    assert evaluate(result.compact(), held_out)["loss"] == pytest.approx(result.metrics["eval_loss"], abs=1e-5)
    # The masks were read while nothing was recorded; training under them goes on all the same.
    result.model.train()
    result.model(**INPUTS, labels=torch.tensor([0, 1])).loss.backward()


@pytest.mark.parametrize("state", ["dense", "masked", "fractional", "compacted"])
def test_finetune(toy, state):
    student = toy.student()
    if state == "compacted":
        student = cofiprune.compact(student, half_of(student))
    masks = None
    if state in ("masked", "fractional"):
        masks = cofiprune.attach(student)
        masks.set_plan(half_of(student))
        if state == "fractional":
            masks["layers.1.heads"] = [0, 0.5, 0, 1]
            masks["hidden"] = masks["hidden"] * 0.75
    kept = None if masks is None else {name: value > 0 for name, value in masks.items()}
    before, held_out = logits(student), toy.rows(64, seed=2)
    taught = {"teacher": toy.teacher, "eval_dataset": held_out, "progress": False}
    settings = {"epochs": 3, "batch_size": 16, "learning_rate": 2e-3}
    result = cofiprune.finetune(student, toy.rows(96, seed=1), **taught, **settings)
    assert masks_of(student) is masks
    assert result.metrics["eval_accuracy"] > 0.9
    assert evaluate(student, held_out)["accuracy"] == pytest.approx(result.metrics["eval_accuracy"])
    assert not torch.equal(logits(student), before)
    assert result.sparsity == pytest.approx(cofiprune.summary(student).sparsity)
    if masks is not None:
        assert all(torch.equal(masks[name] > 0, kept[name]) for name in kept)
        assert_masked_is_compacted(student, result.compact())


def test_finetune_takes_the_plain_names_of_its_settings(toy):
    settings = {"learning_rate": 4e-3, "lr_scheduler_type": "constant", "batch_size": 16, "logging_steps": 1}
    result = cofiprune.finetune(toy.student(), toy.rows(32), epochs=2, **settings)
    assert [entry["learning_rate"] for entry in result.history] == [4e-3] * 4


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 0, "finetune_epochs": 2},
        {"epochs": 0, "finetune_epochs": 0},
        {"epochs": 1, "freeze_epochs": 5},
        {"epochs": 0.1, "sparsity_warmup_epochs": 7},
        {"epochs": 1, "pre_finetune_epochs": 1, "warmup_ratio": 0.5},
        {"epochs": 2, "gradient_accumulation_steps": 50},
        {"epochs": 2, "batch_size": 500, "eval_batch_size": 1},
        {"epochs": 2, "max_grad_norm": 0, "weight_decay": 0.1},
        {"epochs": 2, "warm_start": True, "lr_scheduler_type": "cosine"},
        {"epochs": 2, "units": ["hidden", "layer", "head", "layer"]},
    ],
    ids=str,
)
def test_unusual_settings(toy, settings):
    settings = {"finetune_epochs": 1, "logging_steps": 1, **settings}
    result = run(toy, 0.7, rows=toy.rows(20), eval_dataset=toy.rows(3, seed=2), **settings)
    assert "eval_accuracy" in result.metrics


def test_a_target_at_the_very_end_of_what_can_be_reached(toy):
    structure = cofiprune.structure(toy.teacher)
    highest = reachable(structure, layer_parameters(structure), ("head",)).highest
    result = run(toy, highest + 0.0045, rows=toy.rows(16), units="head")
    assert all(not result.plan.keep[f"layers.{layer}.attention"] for layer in range(2))


def test_a_model_may_lose_all_its_layers(toy):
    small = run(toy, 0.998, rows=toy.rows(16), units="layer", teacher="self").compact()
    assert toy.parameters_of_layers(small, cofiprune.structure(small)) == 0


def test_gradient_checkpointing_changes_nothing(toy):
    students = [toy.student(), with_checkpointing(toy.student())]
    for student in students:
        run(toy, student=student, teacher="self", dropout=True)
    finals = [toy.snapshot(student) for student in students]
    assert max((finals[0][name] - finals[1][name]).abs().max() for name in finals[0]) < 1e-4
    with pytest.raises(cofiprune.CofipruneError, match="use_reentrant"):
        run(toy, student=with_checkpointing(toy.student(), reentrant=True), method="cofi")


def test_a_model_in_bfloat16(toy):
    for settings in ({}, {"num_labels": 1}):
        student = toy.bert(**settings).bfloat16()
        dense = copy.deepcopy(student)
        rows = toy.rows(32, labels=lambda ids: {"labels": len(ids) % 2})
        result = cofiprune.prune(student, rows, target_sparsity=0.5, teacher="self", eval_dataset=rows[:8], **BRIEF)
        assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
        assert abs(result.sparsity - 0.5) <= 0.005
        masked, compacted = logits(student), logits(result.compact())
        assert masked.dtype == torch.bfloat16
        assert (masked - compacted).abs().max() < 0.02
        assert dense.dtype == result.compact().dtype


def test_a_compacted_model_is_pruned_further(toy):
    small = cofiprune.compact(toy.student(), half_of(toy.teacher))
    result = run(toy, 0.4, small, teacher=toy.teacher, distill_layers=2)  # of what it is now
    run(toy, 0.3, result.compact())


def test_pruning_twice_takes_the_masks_off_first(toy):
    student = toy.student()
    run(toy, 0.3, student, toy.rows(16))
    with pytest.warns(UserWarning, match="taken off.*compact"):
        run(toy, 0.5, student, toy.rows(16))


def test_a_batch_without_a_label_that_counts_is_no_loss_that_is_no_number(toy):
    tasks = {
        "BertForMaskedLM": lambda ids: {"labels": [-100] * len(ids)},
        "BertForTokenClassification": lambda ids: {"labels": [-100] * len(ids)},
        "BertForQuestionAnswering": lambda ids: {"start_positions": 99, "end_positions": 99},
        "BertForSequenceClassification": lambda ids: {"labels": -100},
    }
    counted = {"BertForQuestionAnswering": spans, "BertForSequenceClassification": lambda ids: {"labels": 1}}
    for cls, label in tasks.items():
        model = toy.bert(cls)
        before = toy.snapshot(model)
        rows = toy.rows(64, labels=label)
        rows[63] = toy.rows(1, labels=counted.get(cls, lambda ids: {"labels": [1] * len(ids)}))[0]
        result = cofiprune.finetune(model, rows, epochs=1, batch_size=4, logging_steps=1, progress=False)
        losses = [entry["label_loss"] for entry in result.history]
        assert (losses.count(0.0), sum(loss > 0 for loss in losses)) == (15, 1)
        assert not toy.is_unchanged(model, before)

"""A teacher's classes are those of the student by their names, not by their places."""

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

import cofiprune
from cofiprune.errors import TeacherError
from cofiprune.oneshot.data_free import _wanted, outputs_of
from toy import collate, unlabelled

NAMES = ("entailment", "neutral", "contradiction")
MOVED = [2, 0, 1]
MATCHED = "matched by their names: the teacher's are contradiction, entailment, neutral"
QUICK = {"epochs": 1, "finetune_epochs": 1, "batch_size": 16, "progress": False}


def named(model, names):
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    return model


def pair(toy, head="ForSequenceClassification", names=NAMES, **settings):
    """A student, and a teacher that says the same with its classes in another order and another case."""
    student = named(toy.bert(f"Bert{head}", num_labels=3, **settings), names)
    teacher = named(copy.deepcopy(student), [names[place].title() for place in MOVED])
    with torch.no_grad():
        for parameter in (*teacher.classifier.parameters(), *student.classifier.parameters()):
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.dim()))
        for parameter in teacher.classifier.parameters():
            parameter.copy_(parameter[MOVED])
    return student.eval(), teacher.eval()


@pytest.mark.parametrize(
    ("head", "settings"),
    [
        ("ForSequenceClassification", {}),
        ("ForSequenceClassification", {"problem_type": "multi_label_classification"}),
        ("ForSequenceClassification", {"problem_type": "regression"}),
        ("ForTokenClassification", {}),
    ],
)
def test_classes_in_another_order_are_matched_by_name(toy, head, settings):
    student, teacher = pair(toy, head, **settings)
    alone = {"label_weight": 0, "distill_layers_weight": 0, "logging_steps": 1, "learning_rate": 1e-9}
    with pytest.warns(UserWarning, match=MATCHED) as seen:
        result = cofiprune.finetune(student, unlabelled(32), teacher=teacher, **{**QUICK, **alone})
    (place,) = (warning.filename for warning in seen if "matched by" in str(warning.message))
    assert place == __file__  # where the caller stands, by which the command line knows warnings of this package
    assert [entry["logits_loss"] for entry in result.history if "logits_loss" in entry] == pytest.approx(
        [0, 0], abs=1e-6
    )


@pytest.mark.filterwarnings("ignore:pruning without data")
def test_so_are_they_without_data_and_inside_a_trainer(toy, tmp_path):
    student, teacher = pair(toy)
    batches = [{"input_ids": torch.tensor([[2, 5, 9, 11]])}]
    for ours, wanted in zip(outputs_of(student, batches), _wanted(student, teacher, batches), strict=True):
        assert torch.allclose(ours[0], wanted[0], atol=1e-6)
    with pytest.warns(UserWarning, match=MATCHED):
        cofiprune.prune(student, target_sparsity=0.3, teacher=teacher)
    student = cofiprune.compact(student)
    settings = TrainingArguments(
        str(tmp_path), max_steps=8, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    callback = cofiprune.PruningCallback(0.3, teacher)
    trainer = Trainer(student, settings, train_dataset=toy.rows(32), data_collator=collate, callbacks=[callback])
    with pytest.warns(UserWarning, match=MATCHED):
        trainer.train()


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [
        (NAMES, NAMES, None),
        (NAMES, ("LABEL_0", "LABEL_1", "LABEL_2"), None),
        (("0", "1", "2"), NAMES, None),
        (NAMES, ("ENTAILMENT", "Neutral", "contradiction"), None),
        (NAMES, ("yes", "maybe", "no"), "matched by their order: the teacher's are yes, maybe, no, the student's ent"),
        (NAMES, ("entailment", "neutral", "no"), "matched by their order"),
    ],
)
def test_other_names_are_told_apart_from_none(toy, recwarn, ours, theirs, says):
    student, teacher = (named(toy.bert(num_labels=3, seed=seed), names) for seed, names in enumerate((ours, theirs)))
    cofiprune.finetune(student, toy.rows(16), teacher=teacher, **QUICK)
    told = [str(warning.message) for warning in recwarn if "the classes" in str(warning.message)]
    assert len(told) == (says is not None)
    assert says is None or says in told[0]


@pytest.mark.parametrize("run", [cofiprune.prune, cofiprune.finetune])
def test_names_of_which_some_are_at_another_place_are_refused(toy, run):
    student = named(toy.bert(num_labels=3), NAMES)
    teacher = named(toy.bert(num_labels=3, seed=1), ("no", "entailment", "neutral"))
    with pytest.raises(
        TeacherError, match="'entailment' is at another place: the teacher's are no, entailment, neutral"
    ):
        run(student, toy.rows(16), teacher=teacher, **QUICK)


def test_names_that_are_left_in_the_configuration_of_a_language_model_say_nothing(toy, recwarn):
    student, teacher = (named(toy.bert("BertForMaskedLM", num_labels=3), names) for names in (NAMES, NAMES[::-1]))
    cofiprune.finetune(student, unlabelled(16), teacher=teacher, label_weight=0, **QUICK)
    assert not [warning for warning in recwarn if "classes" in str(warning.message)]

"""Rows of text and labels by name, given to `prune`, `finetune` and `evaluate` with a tokenizer."""

import json
import sys

import pytest
import torch
from transformers import BertTokenizerFast

import cofiprune
from cofiprune.data import tokenise
from cofiprune.data.reading import Reading
from cofiprune.errors import ArgumentError, DataError, SettingsError
from small import bert

GOOD, BAD = ("good", "fine", "great"), ("bad", "poor", "dull")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, "a", "film", "who", "made", "it", "is")
NAMES = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}, "vocab_size": len(WORDS)}
SHORT = {
    "method": "one-shot",
    "target_sparsity": 0.5,
    "batch_size": 4,
    "progress": False,
    "units": ("head", "intermediate"),
}
ANSWER = {"text": ["film"], "answer_start": [7]}


@pytest.fixture(scope="module")
def tokenizer():
    return BertTokenizerFast(vocab={word: index for index, word in enumerate(WORDS)})


def model_for(task="SequenceClassification", **settings):
    return bert(f"BertFor{task}", **{**NAMES, **settings})


CASES = {
    "text": ("SequenceClassification", {"text": "a good film", "label": "yes"}, {}),
    "a pair": ("SequenceClassification", {"premise": "a film", "hypothesis": "it is", "label": "no"}, {}),
    "other names": (
        "SequenceClassification", {"review": "a good film", "stars": "yes", "label": 7},
        {"text_column": "review", "label_column": "stars"},
    ),
    "tokens and tags": ("TokenClassification", {"tokens": ["a", "film"], "ner_tags": ["no", "yes"]}, {}),
    "a question": ("QuestionAnswering", {"question": "who made it", "context": "a good film", "answers": ANSWER}, {}),
    "tokens with a name as label": ("SequenceClassification", {"input_ids": [2, 5, 3], "label": "Yes"}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_rows_of_text_prune_as_their_tokens_do(case, tokenizer):
    task, row, named = CASES[case]
    if task == "QuestionAnswering":
        row = {**row, "answers": {"text": ["film"], "answer_start": [row["context"].index("film")]}}
    rows = [row] * 12
    reading = Reading(tokenizer, **named)
    tokens = reading.rows(rows, model_for(task), "rows")
    assert "input_ids" in tokens[0]
    assert {"labels", "start_positions"} & tokens[0].keys()
    results = [
        cofiprune.prune(model_for(task), given, eval_dataset=given, **SHORT, **more)
        for given, more in ((rows, {"tokenizer": tokenizer, **named}), (tokens, {}))
    ]
    assert results[0].plan == results[1].plan
    assert results[0].metrics == results[1].metrics
    measured = cofiprune.evaluate(results[0].model, rows, tokenizer=tokenizer, **named)
    assert measured["loss"] == pytest.approx(results[0].metrics["eval_loss"], rel=1e-4)


def test_finetune_reads_a_file_and_names_of_classes(tokenizer, tmp_path):
    rows = [{"sentence": f"a {word} film", "label": "yes" if word in GOOD else "no"} for word in (*GOOD, *BAD)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    model = bert(vocab_size=len(WORDS))
    arguments = {"tokenizer": tokenizer, "label_names": ["no", "yes"], "progress": False}
    cofiprune.finetune(model, tmp_path / "rows.json", epochs=1, **arguments)
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert "accuracy" in cofiprune.evaluate(model, rows, tokenizer=tokenizer)


def test_a_datasets_dataset_of_text_and_one_of_tokens(tokenizer):
    datasets = pytest.importorskip("datasets")
    model, reading = model_for(), Reading(tokenizer)
    texts = datasets.Dataset.from_list([{"text": "a good film", "label": "yes"}] * 3)
    assert reading.rows(texts, model, "it") == tokenise(list(texts), tokenizer, model)
    tokens = texts.map(lambda row: {**tokenizer(row["text"]), "label": 1})
    assert reading.rows(tokens, model, "it") is tokens, "what is read lazily stays so"
    assert reading.rows(tokens.with_format("torch"), model, "it")[0]["label"] == torch.tensor(1)


def test_masked_texts_are_masked(tokenizer):
    torch.manual_seed(0)
    rows = [{"text": "a good film is it"}] * 8
    assert "perplexity" in cofiprune.evaluate(model_for("MaskedLM"), rows, tokenizer=tokenizer)


TEXT = [{"text": "a good film", "label": "yes"}]
MISTAKES = {
    "no tokenizer": (TEXT, {}, DataError, "train_dataset: the text in 'text' needs a tokenizer: pass tokenizer=..."),
    "no tokenizer, labels as numbers": ([{"text": "a", "label": 1}], {}, DataError, "Pass tokenizer=..."),
    "a name": (TEXT, {"tokenizer": "bert"}, SettingsError, "AutoTokenizer.from_pretrained"),
    "a label that is none": (
        [{"text": "a", "label": "maybe"}], {"tokenizer": 1}, DataError,
        r"train_dataset: row 0 (from 0): label 'maybe' is not among no, yes",
    ),
    "a column that is none": (
        TEXT, {"tokenizer": 1, "text_column": "txt"}, DataError, "train_dataset has no column 'txt'. Did you mean",
    ),
    "no text": ([{"review": "a", "label": "no"}], {"tokenizer": 1}, DataError, "name them by text_column"),
    "names": (TEXT, {"tokenizer": 1, "label_names": ["a"]}, DataError, "label_names has 1 names and the model 2"),
    "the Trainer's name": (TEXT, {"processing_class": 1}, SettingsError, "Did you mean 'tokenizer'?"),
    "a slip in an argument": (TEXT, {"target_sparsty": 0.9}, SettingsError, "Did you mean 'target_sparsity'?"),
    "a slip in a setting": (TEXT, {"epoch": 3}, SettingsError, "Did you mean 'epochs'"),
    "nothing near": (TEXT, {"zzzz": 3}, SettingsError, "unknown setting 'zzzz'. Settings: "),
    "no file": ("nowhere.csv", {"tokenizer": 1}, DataError, "train_dataset: there is no file nowhere.csv"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("function", ["prune", "finetune"])
def test_mistakes_name_what_is_meant(name, function, tokenizer):
    rows, arguments, kind, says = MISTAKES[name]
    if function == "finetune" and "target_sparsty" in arguments:
        arguments, says = {"train_datset": 1}, "Did you mean 'train_dataset'"
    if arguments.get("tokenizer") == 1:
        arguments = {**arguments, "tokenizer": tokenizer}
    model = model_for()
    before = model.config.to_dict()
    with pytest.raises(kind) as caught:
        getattr(cofiprune, function)(model, rows, **arguments)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 320 or name == "nothing near"
    assert model.config.to_dict() == before


@pytest.mark.parametrize(
    ("name", "slip", "meant"),
    [
        ("compact", "fused", "fuse"),
        ("attach", "unit", "units"),
        ("summary", "seqlen", "seq_len"),
        ("benchmark", "batchsize", "batch_size"),
        ("evaluate", "tokeniser", "tokenizer"),
        ("prune_vocabulary", "min_cout", "min_count"),
        ("structure", "modle", "model"),
    ],
)
def test_a_slip_in_any_function_names_the_argument(name, slip, meant):
    with pytest.raises(ArgumentError, match=f"{name} has no argument '{slip}'. Did you mean '{meant}'"):
        getattr(cofiprune, name)(model_for(), **{slip: 1})
    assert issubclass(ArgumentError, TypeError), sys.version

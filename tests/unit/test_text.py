"""Data files become rows, and rows of text become tokens with labels, words and spans in their places."""

import csv
import json
import sys
from functools import partial

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertTokenizerFast

from cofiprune.data import Labels, TextColumns, find_text_columns, load_rows, tokenise
from cofiprune.errors import DataError
from small import bert as new_bert

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{one}" for one in LETTERS), ".", "film", "town")


@pytest.fixture(scope="module")
def tokenizer():
    return BertTokenizerFast(vocab={word: index for index, word in enumerate(WORDS)})


bert = partial(
    new_bert, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=len(WORDS),
    max_position_embeddings=512,
)  # fmt: skip


# Files

ROWS = [{"sentence": 'said "no", twice', "label": "yes"}, {"sentence": "née", "label": "no"}]


def write(file, rows):
    """Write rows in the format of the file's ending."""
    if file.suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows), file)
    elif file.suffix == ".csv":
        with file.open("w", newline="", encoding="utf-8") as lines:
            table = csv.DictWriter(lines, rows[0])
            table.writeheader()
            table.writerows(rows)
    elif file.suffix == ".tsv":
        lines = [rows[0].keys(), *(map(str, row.values()) for row in rows)]
        file.write_text("\n".join(map("\t".join, lines)), encoding="utf-8")
    else:
        file.write_text(json.dumps(rows) if file.suffix == ".json" else "\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_all_kinds_of_files_hold_the_same_rows(ending, tmp_path):
    write(tmp_path / f"rows.{ending}", ROWS)
    assert load_rows(tmp_path / f"rows.{ending}") == ROWS


def test_lines_of_text_and_folders_of_datasets(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert load_rows(tmp_path / "a.txt") == [{"text": "one"}, {"text": "two"}]
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "saved"))
    assert load_rows(tmp_path / "saved", "train") == load_rows(tmp_path / "saved" / "train") == ROWS


def test_questions_are_read_as_squad_was_published(tmp_path):
    answers = [{"text": "x", "answer_start": 2}, {"text": "a x", "answer_start": 0}]
    entry = {"id": "1", "question": "what", "answers": answers, "is_impossible": False}
    articles = {"version": "x", "data": [{"title": "t", "paragraphs": [{"context": "a x", "qas": [entry]}]}]}
    (tmp_path / "dev-v2.0.json").write_text(json.dumps(articles, indent=1))
    (row,) = load_rows(tmp_path, "dev-v2.0", "dev")
    assert row == {
        "id": "1", "question": "what", "context": "a x", "answers": {"text": ["x", "a x"], "answer_start": [2, 0]},
    }  # fmt: skip
    del entry["answers"]
    (tmp_path / "dev-v2.0.json").write_text(json.dumps(articles))
    with pytest.raises(DataError, match="not nested as SQuAD is: KeyError 'answers'"):
        load_rows(tmp_path, "dev")


def test_a_split_is_the_file_of_its_name_or_all_of_its_shards(tmp_path):
    write(tmp_path / "train-00000-of-00002.csv", ROWS[:1])
    write(tmp_path / "train-00001-of-00002.csv", ROWS[1:])
    write(tmp_path / "dev_matched.json", ROWS[:1])
    assert load_rows(tmp_path, "train") == ROWS
    assert load_rows(tmp_path, "validation", "dev") == ROWS[:1]
    write(tmp_path / "train_other.csv", ROWS)
    with pytest.raises(DataError, match=r"more than one file for train \(train-00000.*, train_other.csv\)"):
        load_rows(tmp_path, "train")
    write(tmp_path / "train.csv", ROWS[:1])
    assert load_rows(tmp_path, "train") == ROWS[:1]
    with pytest.raises(DataError, match=r"no test.\* .* which has dev_matched.json, train"):
        load_rows(tmp_path, "test")
    with pytest.raises(DataError, match="nowhere does not exist"):
        load_rows(tmp_path / "nowhere", "test")


def test_broken_lines_of_published_tables_are_left_out_with_a_warning(tmp_path):
    (tmp_path / "a.tsv").write_text("sentence\tlabel\nx\t1\ny\nz\t2\t3\n")
    with pytest.warns(UserWarning, match="2 lines have not as many fields"):
        assert load_rows(tmp_path / "a.tsv") == [{"sentence": "x", "label": "1"}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "sentence,label\nx,1,2\n", "line 2 has 3 fields, the header has 2"),
        ("a.csv", "sentence,label\nx\n", "line 2 has 1 fields, the header has 2"),
        ("a.csv", "sentence,label\n", "has no rows"),
        ("a.jsonl", '{"text": "x"}\nnonsense\n', "line 2 is not a JSON object"),
        ("a.json", '["x"]', "entry 1 is no JSON object"),
        ("a.json", '[{"text": "x"}', "cannot read"),
        ("a.xlsx", "x", "has an ending that is not known"),
        ("a.parquet", "x", "cannot read"),
    ],
)
def test_files_that_cannot_be_read_are_explained(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        load_rows(tmp_path / name)


def test_parquet_without_a_reader_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_text("x")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        load_rows(tmp_path / "a.parquet")


# Columns and labels


@pytest.mark.parametrize(
    ("row", "task", "found"),
    [
        ({"premise": "", "hypothesis": "", "gold_label": 1}, "classification", ("premise", "hypothesis", "gold_label")),
        ({"idx": 1, "sentence": "a", "label": 1}, "classification", ("sentence", None, "label")),
        ({"tokens": ["a"], "pos_tags": [1], "ner_tags": [2]}, "token-classification", ("tokens", None, "ner_tags")),
        ({"question": "a", "context": "b", "answers": {}}, "question-answering", ("question", "context", "answers")),
        ({"text": "a", "label": 1}, "masked-lm", ("text", None, None)),
        ({"input_ids": [1], "labels": 1}, "classification", (None, None, "labels")),
    ],
)  # fmt: skip
def test_columns_are_known_by_their_names(row, task, found):
    assert find_text_columns(row, task) == TextColumns(*found)


def test_labels_by_name_number_or_id():
    config = BertConfig(id2label={0: "No", 1: "yes"})
    labels = Labels.of_model(config)
    assert labels.encode(["no", "YES", "1", 0, "yes"]) == [0, 1, 1, 0, 1]
    with pytest.raises(DataError, match=r"^row 1 \(from 0\): label 'maybe' is not among No, yes$"):
        labels.encode(["no", "maybe"])
    with pytest.raises(DataError, match="row 0 .* has no label"):
        labels.encode([None])
    with pytest.raises(DataError, match="label 'maybe' is not among LABEL_0, LABEL_1; give their names"):
        Labels.of_model(BertConfig()).encode(["maybe"])
    assert Labels.of_data(["b", "a", "b"]).names == ("a", "b")
    assert Labels.of_data([0, "2"]).names == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert Labels.of_data([[0, 1, 1]]) == Labels(("LABEL_0", "LABEL_1", "LABEL_2"), multi_label=True)
    numbers = Labels.of_data(["0.5", 3])
    assert numbers.encode(["0.5", 3]) == [0.5, 3.0]
    numbers.apply(config)
    assert (config.num_labels, config.problem_type) == (1, "regression")


def test_texts_pairs_and_labels(tokenizer):
    model = bert(id2label={0: "bad", 1: "good"})
    rows = [{"premise": "a film", "hypothesis": "b", "label": "Good"}, {"premise": "a", "hypothesis": "b", "label": 0}]
    found = tokenise(rows, tokenizer, model)
    assert [tokenizer.decode(row["input_ids"]) for row in found] == [
        "[CLS] a film [SEP] b [SEP]",
        "[CLS] a [SEP] b [SEP]",
    ]
    assert [row["labels"] for row in found] == [1, 0]
    (row,) = tokenise([{"text": "a film", "idx": 3}], tokenizer, bert("BertModel"))
    assert set(row) == {"input_ids", "token_type_ids", "attention_mask"}
    (row,) = tokenise([{"text": "film " * 30}], tokenizer, bert("BertForMaskedLM", max_position_embeddings=16))
    assert len(row["input_ids"]) == 16
    assert tokenise([{"input_ids": [1, 2], "label": "good"}], None, model) == [{"input_ids": [1, 2], "labels": 1}]
    with pytest.raises(DataError, match="max_length is 99; BertForMaskedLM reads at most 16 tokens"):
        tokenise([{"text": "a"}], tokenizer, bert("BertForMaskedLM", max_position_embeddings=16), max_length=99)
    with pytest.raises(DataError, match="row 1 .* has no text in 'text', but None"):
        tokenise([{"text": "a"}, {"text": None}], tokenizer, bert("BertModel"))


# Words


def test_the_first_token_of_a_word_has_its_label_and_the_others_none(tokenizer):
    model = bert("BertForTokenClassification", id2label={0: "O", 1: "B-x", 2: "I-x"})
    rows = [{"tokens": ["films", "\u200b", "a"], "ner_tags": ["B-x", "I-x", 0]}]
    (row,) = tokenise(rows, tokenizer, model)
    assert (
        tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["[CLS]", "film", "##s", "a", "[SEP]"][: len(row["words"])]
    )
    assert row["words"] == [-1, 0, -1, 2, -1]
    assert row["labels"] == [-100, 1, -100, 0, -100]
    (row,) = tokenise([{"tokens": list("abcde"), "ner_tags": [0, 1, 2, 0, 0]}], tokenizer, model, max_length=5)
    assert row["words"] == [-1, 0, 1, 2, -1]
    assert row["labels"] == [-100, 0, 1, 2, -100]
    (row,) = tokenise([{"tokens": ["a"]}], tokenizer, model)
    assert "labels" not in row
    for wrong, message in (
        ({"tokens": ["a"], "ner_tags": [0, 1]}, r"row 0 \(from 0\) has 1 words and 2 labels"),
        ({"tokens": ["a"], "ner_tags": ["B-y"]}, r"row 0 .*, word 0 \(from 0\): label 'B-y' is not among O, B-x"),
        ({"tokens": "a b", "ner_tags": [0]}, "has no list of words in 'tokens'"),
        ({"tokens": ["a", None], "ner_tags": [0, 0]}, "has no list of words in 'tokens'"),
        ({"tokens": ["a"], "ner_tags": [float("inf")]}, "label 'inf' is not among O, B-x"),
    ):
        with pytest.raises(DataError, match=message):
            tokenise([wrong], tokenizer, model)

    class Slow:
        is_fast = False

    with pytest.raises(DataError, match="need a fast tokenizer"):
        tokenise(rows, Slow(), model)


# Questions

CONTEXT = " ".join(f"film {index} is of town {index % 7} on day {index % 5}." for index in range(60))


@pytest.fixture(scope="module")
def answering():
    return bert("BertForQuestionAnswering")


def ask(context, *answers, question="what won"):
    starts = [context.index(text) for text in answers]
    return {"question": question, "context": context, "answers": {"text": list(answers), "answer_start": starts}}


def test_a_span_is_that_of_the_answer_where_it_is_whole(tokenizer, answering):
    rows = [ask("a  good film .", "good"), ask("a film ."), ask("a  good film .", " film "), ask("a goods", "good")]
    found, empty, spaced, part = tokenise(rows, tokenizer, answering)
    assert set(found) == {"input_ids", "token_type_ids", "attention_mask", "start_positions", "end_positions"}

    def answer(row):
        return tokenizer.decode(row["input_ids"][row["start_positions"] : row["end_positions"] + 1])

    assert (answer(found), answer(spaced), answer(part)) == ("good", "film", "good")
    assert (empty["start_positions"], empty["end_positions"]) == (0, 0)
    (cut,) = tokenise([ask("film " * 20 + "good", "good")], tokenizer, answering, max_length=20)
    assert cut["start_positions"] == len(cut["input_ids"])  # past the last token: no loss counts it


@pytest.mark.parametrize(("max_length", "stride"), [(48, 16), (64, 0), (96, 60), (512, 128)])
def test_windows_overlap_by_the_stride_and_cover_the_passage(tokenizer, answering, max_length, stride):
    rows = tokenise([ask(CONTEXT, "town 3")], tokenizer, answering, max_length=max_length, stride=stride)
    spans = [row["offsets"][row["offsets"][:, 0] >= 0] for row in rows]
    assert all(len(row["input_ids"]) == len(row["offsets"]) <= max_length for row in rows)
    assert all(len(row["input_ids"]) == max_length for row in rows[:-1])
    joined = [tuple(span) for index, part in enumerate(spans) for span in part[stride if index else 0 :].tolist()]
    assert joined == tokenizer(CONTEXT, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]


def test_a_window_points_at_the_answer_when_it_holds_all_of_it(tokenizer, answering, monkeypatch):
    monkeypatch.setattr("cofiprune.data.text._AT_ONCE", 7)
    questions = [ask(CONTEXT, f"film {index} is of town {index % 7}") for index in range(20, 40)]
    held = [0] * len(questions)
    rows = tokenise(questions, tokenizer, answering, max_length=41, stride=4)
    assert [row["example"] for row in rows] == sorted(row["example"] for row in rows)
    for row in rows:
        (text,), (begin,) = questions[row["example"]]["answers"].values()
        inside = row["offsets"][row["offsets"][:, 0] >= 0]
        first, last = row["start_positions"], row["end_positions"]
        if inside[0, 0] <= begin and inside[-1, 1] >= begin + len(text):
            held[row["example"]] += 1
            assert CONTEXT[row["offsets"][first, 0] : row["offsets"][last, 1]] == text
        else:
            assert (first, last) == (0, 0)
    assert set(held) == {0, 1}  # an answer is longer than what windows share: some are cut by all of them


def test_a_long_question_is_cut_and_a_stride_leaves_room(tokenizer, answering):
    question = ask(CONTEXT, "town 3", question="  who " + "really " * 400)
    rows = tokenise([question], tokenizer, answering, max_length=64, stride=16)
    assert {int((row["offsets"][:, 0] < 0).sum()) for row in rows} == {3 + (64 - 3 - 16) // 2}
    (first, *_) = tokenise([question], tokenizer, answering, max_length=384, stride=128)
    assert first["input_ids"].index(tokenizer.sep_token_id) == 1 + 64
    for stride in (64, 100, 60):
        with pytest.raises(DataError, match=f"stride={stride} leaves no room .* it can be 59 at most"):
            tokenise([question], tokenizer, answering, max_length=64, stride=stride)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"text": ["film"], "answer_start": [1]}, "row 0 .* 'film' does not stand at character 1, but ' fil'"),
        ({"text": ["film"], "answer_start": [-1]}, "does not stand at character -1"),
        ({"text": [""], "answer_start": [0]}, "does not stand at character 0"),
        ({"text": ["film"], "answer_start": []}, "an answer is {'text'"),
        ({"text": ["film"], "answer_start": ["x"]}, "an answer is {'text'"),
        ({"text": [1.5], "answer_start": [0]}, "an answer is {'text'"),
        (["film"], "has no answer in 'answers'"),
    ],
)
def test_answers_stand_in_their_passage(tokenizer, answering, answers, message):
    with pytest.raises(DataError, match=message):
        tokenise([{"question": "what", "context": "a film", "answers": answers}], tokenizer, answering)


def test_training_learns_to_find_answers(tokenizer):
    """Rows, positions and windows fit together: a small model learns where the answer stands."""
    import cofiprune

    generator = np.random.default_rng(0)
    contexts = [" ".join(generator.permutation([*"abcdefgh", str(generator.integers(10))])) for _ in range(96)]
    questions = [ask(text, next(word for word in text.split() if word.isdigit())) for text in contexts]
    torch.manual_seed(0)
    model = bert("BertForQuestionAnswering", hidden_size=32, intermediate_size=32, initializer_range=0.2)
    rows = tokenise(questions, tokenizer, model, stride=4)
    cofiprune.finetune(model, rows, epochs=4, learning_rate=1e-2, batch_size=16, progress=False)
    assert cofiprune.evaluate(model, rows)["span_accuracy"] > 0.9

"""Data sets become batches: the same rows, padded, in a reproducible order, or an error that names the row."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import RobertaConfig, RobertaForSequenceClassification, ViTConfig, ViTForImageClassification

from cofiprune.data.batches import shuffled, to_model
from cofiprune.data.checks import longest_sequence
from cofiprune.data.prepare import prepare
from cofiprune.data.tasks import forward_names, task_of
from cofiprune.errors import DataError
from small import bert as new_bert

SMALL = {
    "vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
    "max_position_embeddings": 16,
}  # fmt: skip
bert = partial(new_bert, **SMALL, pad_token_id=3)


def rows_of(lengths, **extra):
    generator = np.random.default_rng(0)
    return [
        {"input_ids": generator.integers(5, 50, length).tolist(), "labels": index % 2, **extra}
        for index, length in enumerate(lengths)
    ]


class Listed(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def taken(batches):
    """Every row of an epoch as (ids without padding, label)."""
    found = []
    for batch in batches:
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            found.append((tuple(ids[mask.bool()].tolist()), int(label)))
    return found


@pytest.mark.parametrize("form", ["list", "torch", "tensors", "datasets", "datasets-torch", "loader", "collator"])
def test_every_form_of_data_set_gives_the_same_rows(form):
    rows = rows_of([3, 7, 5, 2, 4, 6, 1])
    wanted = sorted((tuple(row["input_ids"]), row["labels"]) for row in rows)
    dataset, collator = rows, None

    def collate(items):
        assert all("text" not in item for item in items)
        ids = [torch.tensor(item["input_ids"]) for item in items]
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        return {"input_ids": ids, "attention_mask": mask, "label": [item["labels"] for item in items]}

    if form == "torch":
        dataset = Listed([{"label": row["labels"], "input_ids": np.array(row["input_ids"])} for row in rows])
    elif form == "tensors":
        dataset = [{name: torch.tensor(value) for name, value in row.items()} for row in rows]
    elif form.startswith("datasets"):
        datasets = pytest.importorskip("datasets")
        dataset = datasets.Dataset.from_list([{**row, "text": "a", "idx": 1} for row in rows])
        if form == "datasets-torch":
            dataset = dataset.with_format("torch")
    elif form == "loader":
        dataset = DataLoader(rows, batch_size=3, collate_fn=collate, shuffle=True)
    elif form == "collator":
        dataset, collator = [{**row, "text": "a"} for row in rows], collate

    batches = prepare(dataset, bert(), batch_size=3, shuffle=True, collator=collator)
    assert len(batches) == 3
    assert batches.labelled
    assert batches.task == "classification"
    assert sorted(taken(batches)) == wanted


def test_padding_uses_the_models_id_and_masks_it():
    (batch,) = prepare(rows_of([4, 2], token_type_ids=None), bert(), batch_size=2)
    assert batch["input_ids"][1, 2:].tolist() == [3, 3]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_labels_per_token_are_padded_so_that_the_loss_ignores_them():
    rows = [{"input_ids": [5, 6, 7], "labels": [0, 1, -100], "token_type_ids": [0, 1, 1]}]
    rows += [{"input_ids": [5, 6], "labels": [0, 1], "token_type_ids": [0, 1]}]
    (batch,) = prepare(rows, bert("BertForTokenClassification"), batch_size=2)
    assert batch["labels"].tolist() == [[0, 1, -100], [0, 1, -100]]
    assert batch["token_type_ids"].tolist() == [[0, 1, 1], [0, 1, 0]]


def test_rows_padded_beforehand_are_cut_to_what_is_used():
    rows = [
        {"input_ids": [5] * n + [3] * (12 - n), "attention_mask": [1] * n + [0] * (12 - n), "label": 0} for n in (2, 5)
    ]
    (batch,) = prepare(rows, bert(), batch_size=2)
    assert batch["input_ids"].shape == (2, 5)
    labelled = [{**row, "label": [0] * 12} for row in rows]
    (batch,) = prepare(labelled, bert("BertForTokenClassification"), batch_size=2)
    assert batch["input_ids"].shape == (2, 12)  # labels that count are never cut away


def test_choices_of_different_lengths():
    rows = [{"input_ids": [[5], [6, 7, 8]], "labels": 0}, {"input_ids": [[5, 6], [7]], "labels": 1}]
    model = bert("BertForMultipleChoice")
    (batch,) = prepare(rows, model, batch_size=2)
    assert batch["input_ids"].tolist() == [[[5, 3, 3], [6, 7, 8]], [[5, 6, 3], [7, 3, 3]]]
    assert model(**batch).loss.isfinite()


@pytest.mark.parametrize(
    ("label", "changes", "task", "dtype"),
    [
        (1.0, {}, "classification", torch.int64),
        (True, {}, "classification", torch.int64),
        ([1, 0, 1], {"num_labels": 3}, "multi-label", torch.float32),
        (1, {"num_labels": 1}, "regression", torch.float32),
        ([0.5, 1.0], {"problem_type": "regression"}, "regression", torch.float32),
    ],
)
def test_labels_get_the_type_of_the_task(label, changes, task, dtype):
    model = bert(**changes)
    batches = prepare([{"input_ids": [5, 6], "label": label}] * 2, model, batch_size=2)
    (batch,) = batches
    assert batches.task == task
    assert batch["labels"].dtype == dtype
    assert model(**batch).loss.isfinite()


def test_tasks_by_class():
    tasks = {cls: task_of(bert(cls)) for cls in ("BertModel", "BertForMaskedLM", "BertForNextSentencePrediction")}
    assert list(tasks.values()) == ["embedding", "masked-lm", "classification"]

    class Mine(transformers.BertForQuestionAnswering):
        pass

    assert task_of(Mine(bert().config)) == "question-answering"


def test_order_depends_on_seed_and_epoch_alone():
    batches = prepare(rows_of([2, 9, 4, 7] * 30), bert(), batch_size=4, shuffle=True, seed=7)
    first = batches.indices()
    assert first == prepare(rows_of([2, 9, 4, 7] * 30), bert(), batch_size=4, shuffle=True, seed=7).indices()
    assert first != batches.indices(1)
    assert sorted(index for batch in batches.indices(1) for index in batch) == list(range(120))


def test_an_epoch_can_be_taken_up_anywhere():
    batches = prepare(rows_of(range(1, 13)), bert(), batch_size=2, shuffle=True)
    whole = taken(batches)
    assert taken(batches.epoch(0, 4)) == whole[8:]
    assert taken(batches.epoch(0, 6)) == []
    assert taken(batches) == whole


def test_a_users_loader_is_reproducible_and_can_be_taken_up():
    loader = DataLoader(
        rows_of([4] * 12),
        batch_size=2,
        shuffle=True,
        collate_fn=lambda rows: (
            {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
            | {"attention_mask": torch.ones(len(rows), 4)}
        ),
    )
    batches = prepare(loader, bert(), batch_size=99)
    before = torch.random.get_rng_state()
    whole = taken(batches)
    assert taken(batches.epoch(0, 4)) == whole[8:]
    assert taken(batches.epoch(1)) != whole
    assert torch.equal(before, torch.random.get_rng_state())
    parts = [taken(batches.shard(rank, 4)) for rank in range(4)]
    assert [len(part) for part in parts] == [4] * 4  # 6 batches: two of them are given twice


def test_a_loader_that_is_distributed_already_is_not_cut_again():
    rows = [{"input_ids": torch.tensor([5, 6]), "labels": n % 2} for n in range(8)]
    sampler = DistributedSampler(rows, num_replicas=2, rank=1, shuffle=False)
    batches = prepare(DataLoader(rows, sampler=sampler), bert(), batch_size=9)
    assert len(batches.shard(1, 2)) == 4


@pytest.mark.parametrize("processes", [2, 3])
def test_shards_together_give_every_row(processes):
    batches = prepare(rows_of([3, 8] * 13), bert(), batch_size=4, shuffle=True)
    parts = [batches.shard(rank, processes) for rank in range(processes)]
    assert len({len(part) for part in parts}) == 1
    assert {index for part in parts for batch in part.indices() for index in batch} == set(range(26))


def test_grouping_saves_padding_and_begins_with_the_longest():
    lengths = np.random.default_rng(0).integers(1, 100, 1000)
    cost = [sum(len(batch) * lengths[batch].max() for batch in shuffled(1000, 8, how, 0, 0)) for how in (None, lengths)]
    assert cost[1] < 1.15 * lengths.sum() < cost[0]
    assert lengths[shuffled(1000, 8, lengths, 0, 3)[0]].max() == lengths.max()
    assert prepare(rows_of([2, 9, 4]), bert(), batch_size=1).indices() == [[1], [2], [0]]


def test_images_are_read_batch_by_batch():
    model = ViTForImageClassification(
        ViTConfig(
            image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
    )
    rows = [{"pixel_values": torch.full((3, 8, 8), float(n)), "label": n % 2, "name": "x"} for n in range(5)]
    batches = prepare(Listed(rows), model, batch_size=2)
    assert [batch["pixel_values"].shape[0] for batch in batches] == [2, 2, 1]
    half = model.to(torch.bfloat16)
    assert half(**to_model(next(iter(batches)), half)).loss.isfinite()
    datasets = pytest.importorskip("datasets")
    columnar = datasets.Dataset.from_list([{**row, "pixel_values": row["pixel_values"].numpy()} for row in rows])
    assert next(iter(prepare(columnar, model, batch_size=2)))["pixel_values"].shape == (2, 3, 8, 8)
    made = columnar.remove_columns("pixel_values").with_transform(
        lambda batch: {"pixel_values": [torch.ones(3, 8, 8) for _ in batch["name"]], "label": batch["label"]}
    )
    assert len(prepare(made, model, batch_size=2)) == 3
    for wrong, message in (
        ({"pixel_values": torch.full((3, 8, 8), float("nan"))}, "row 1: 'pixel_values' holds nan"),
        ({"pixel_values": torch.zeros(3, 9, 8)}, r"row 1: 'pixel_values' has shape \(3, 9, 8\)"),
        ({"label": 2}, "row 1: label 2 is not among the 2 classes"),
    ):
        with pytest.raises(DataError, match=message):
            prepare([rows[0], {**rows[1], **wrong}], model, batch_size=2)


def test_roberta_counts_positions_from_its_padding_id():
    model = RobertaForSequenceClassification(RobertaConfig(**SMALL, pad_token_id=1, type_vocab_size=1))
    assert longest_sequence(model) == 14
    with pytest.raises(DataError, match=r"row 1: 15 tokens; .* reads at most 14"):
        prepare(rows_of([14, 15]), model, batch_size=2)
    (batch,) = prepare(rows_of([14, 3]), model, batch_size=2)
    assert model(**batch).loss.isfinite()
    with pytest.raises(DataError, match="row 0: token type 1 is outside the 1"):
        prepare([{"input_ids": [5, 6], "token_type_ids": [0, 1], "labels": 0}], model, batch_size=2)


GOOD = {"input_ids": [5, 6, 7], "labels": 1}
WRONG = {
    "empty": ([], {}, "train_dataset: there are no rows"),
    "text": ([{"text": "a", "label": 1}], {}, r"reads 'input_ids', .*'text' \(str\).*tokenise the text"),
    "tuples": ([([5], 1)], {}, "row 0 is a tuple; rows are dicts"),
    "several": ({"train": [GOOD]}, {}, r"not a data set but several.*'train'"),
    "nothing": ((row for row in []), {}, "train_dataset: there are no rows"),
    "unlabelled": ([{"input_ids": [5]}], {}, "the rows have no 'labels'.*teacher"),
    "class": ([GOOD, {**GOOD, "labels": 2}], {}, r"row 1: label 2 is not among the 2 classes .*num_labels"),
    "hidden label": ([{**GOOD, "labels": -1}], {}, "row 0: label -1 .*hide their labels"),
    "fraction": ([GOOD, {**GOOD, "labels": 0.5}], {}, "row 1: label 0.5 is not a class.*num_labels=1"),
    "two labels": ([GOOD, {**GOOD, "labels": [1, 1]}], {}, "row 1: 'labels' has 1 dimensions and 0 in row 0"),
    "text label": ([{**GOOD, "labels": "positive"}], {}, "row 0: 'labels' must hold numbers; found str 'positive'"),
    "vocabulary": ([GOOD, GOOD, {**GOOD, "input_ids": [5, 50]}], {}, "row 2: token id 50 is outside .* of 50"),
    "negative id": ([{**GOOD, "input_ids": [-1]}], {}, "row 0: token id -1 is outside"),
    "long": ([GOOD, {**GOOD, "input_ids": [5] * 17}], {}, "row 1: 17 tokens; .*at most 16.*max_length=16"),
    "no tokens": ([GOOD, {**GOOD, "input_ids": []}], {}, "row 1: no tokens"),
    "keys": ([GOOD, {"input_ids": [5]}], {}, "row 1 lacks 'labels'"),
    "nan": ([{**GOOD, "labels": 0.1}, {**GOOD, "labels": np.nan}], {"num_labels": 1}, "row 1: 'labels' holds nan"),
    "mask": ([{**GOOD, "attention_mask": [1]}], {}, r"row 0: 'attention_mask' has shape \(1,\)"),
    "multi": ([{**GOOD, "labels": [0, 2, 0]}], {"num_labels": 3}, r"row 0: label 2 must lie in \[0, 1\]"),
    "few": ([{**GOOD, "labels": [0, 1]}], {"num_labels": 3}, "row 0: 2 labels; this model takes 3"),
    "floats": ([{**GOOD, "input_ids": [0.5]}], {}, "token ids are whole numbers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_data_is_refused_before_training(case):
    dataset, changes, message = WRONG[case]
    with pytest.raises(DataError, match=f"(?s){message}"):
        prepare(dataset, bert(**changes), batch_size=2, name="train_dataset")


@pytest.mark.parametrize(
    ("cls", "row", "message"),
    [
        ("BertModel", GOOD, "BertModel has no head"),
        ("BertForTokenClassification", {**GOOD, "labels": [0, 1]}, r"'labels' has shape \(2,\) and 'input_ids' \(3,\)"),
        ("BertForTokenClassification", {**GOOD, "labels": 1}, "row 0: 'labels' has shape"),
        ("BertForMaskedLM", {**GOOD, "labels": [5, 6, 50]}, "row 0: label 50 is not among the 50 token ids"),
        ("BertForQuestionAnswering", {"input_ids": [5], "start_positions": 0}, "'start_positions' and 'end_positions'"),
        (
            "BertForQuestionAnswering",
            {"input_ids": [5], "start_positions": 0, "end_positions": -1},
            "row 0: 'end_positions' is -1",
        ),
        ("BertForMultipleChoice", {**GOOD, "labels": 0}, r"takes \[choices, tokens\]"),
        ("BertForMultipleChoice", {"input_ids": [[5], [6]], "labels": 2}, "label 2 is not among the 2 choices"),
    ],
)
def test_wrong_labels_of_each_task(cls, row, message):
    with pytest.raises(DataError, match=message):
        prepare([row], bert(cls), batch_size=1)


def test_a_collator_and_a_loader_are_checked_too():
    def wrong(rows):
        return {"input_ids": torch.full((len(rows), 3), 77), "labels": torch.zeros(len(rows))}

    with pytest.raises(DataError, match="in the first rows: row 0: token id 77"):
        prepare(rows_of([3, 3]), bert(), batch_size=2, collator=wrong)
    with pytest.raises(DataError, match="row 1: token id 77"):
        prepare([GOOD, {**GOOD, "input_ids": [77]}], bert(), batch_size=2, collator=wrong)

    def right(rows):
        return {"input_ids": torch.full((len(rows), 3), 7), "labels": torch.zeros(len(rows))}

    with pytest.raises(DataError, match="row 40: label 2 is not among the 2 classes"):
        prepare([GOOD] * 40 + [{**GOOD, "labels": 2}], bert(), batch_size=2, collator=right)
    with pytest.raises(DataError, match="in the first batch: row 0: token id 77"):
        prepare(DataLoader(rows_of([3, 3]), collate_fn=wrong), bert(), batch_size=2)
    with pytest.raises(DataError, match="a batch must be a dict"):
        prepare(DataLoader([1, 2]), bert(), batch_size=2)


def test_spans_past_the_end_are_left_out_of_the_loss():
    rows = [{"input_ids": [5, 6], "start_positions": 9, "end_positions": 9}]
    rows += [{"input_ids": [5, 6, 7, 8], "start_positions": 1, "end_positions": 2}]
    model = bert("BertForQuestionAnswering")
    (both,) = prepare(rows, model, batch_size=2)
    (one,) = prepare(rows[1:], model, batch_size=1)
    assert torch.allclose(model(**both).loss, model(**one).loss)


def test_unlabelled_rows_are_enough_with_a_teacher():
    batches = prepare([{"input_ids": [5]}], bert(), batch_size=1, need_labels=False)
    assert not batches.labelled


@pytest.mark.parametrize("named", [False, True])
def test_a_forward_that_hands_on_takes_what_the_class_above_takes(named: bool) -> None:
    class All(transformers.BertForSequenceClassification):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    class Rest(transformers.BertForSequenceClassification):
        def forward(self, input_ids: Any = None, weight: float = 1.0, **kwargs: Any) -> Any:
            return super().forward(input_ids, **kwargs)

    stock = new_bert()
    model = (Rest if named else All)(stock.config)
    assert set(forward_names(model)) == {*forward_names(stock), *(("weight",) if named else ())}
    assert not {"args", "kwargs"} & {*forward_names(model), *forward_names(stock)}
    rows = [{"input_ids": [2, 5 + n, 6], "attention_mask": [1, 1, 1], "labels": n % 2} for n in range(4)]
    (batch,) = prepare(rows, model, batch_size=4)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}

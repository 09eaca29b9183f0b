"""Rows without a length: trained on for a number of steps, resumed at their place, and read no further than needed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import cofiprune
from cofiprune.data.streams import FIRST_ROWS
from cofiprune.errors import CheckpointError, CofipruneError, DataError, SettingsError
from processes import launch, outputs
from toy import bert, unlabelled
from toy import rows as new_rows

QUICK: dict[str, Any] = {"batch_size": 8, "progress": False, "logging_steps": 1}


class Endless(IterableDataset[dict[str, Any]]):
    """A torch data set; `Plain` is like those of `datasets`, which have no class in common with it."""

    def __init__(self, rows: list[dict[str, Any]], times: int | None = None) -> None:
        self.rows, self.times, self.read = rows, times, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        turns = itertools.repeat(None) if self.times is None else range(self.times)
        for row in itertools.chain.from_iterable(self.rows for _ in turns):
            self.read += 1
            yield row


class Plain:
    def __init__(self, rows: list[dict[str, Any]], times: int | None = None) -> None:
        self._rows = Endless(rows, times)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows)


def losses(result: Any) -> list[float]:
    return [entry["loss"] for entry in result.history if "loss" in entry]


@pytest.mark.parametrize("kind", [Endless, Plain])
@pytest.mark.parametrize("times", [None, 1])
def test_as_many_steps_are_trained_as_are_asked_for(kind: Any, times: int | None) -> None:
    rows = new_rows(24)
    for steps in (1, 7):
        result = cofiprune.finetune(bert(), kind(rows, times), max_steps=steps, **QUICK)
        assert len(losses(result)) == result.history[-1]["step"] == steps


@pytest.mark.parametrize("method", ["auto", "one-shot", "cofi", "gates"])
def test_pruning_takes_as_many_steps(method: str) -> None:
    settings = {"finetune_epochs": 1, "method": method, "max_steps": 9, "teacher": "self", **QUICK, "batch_size": 64}
    result = cofiprune.prune(bert(), Plain(new_rows(24)), target_sparsity=0.4, **settings)
    assert result.history[-1]["step"] == pytest.approx(9, abs=1)
    assert result.sparsity == pytest.approx(0.4, abs=0.005)


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"finetune_batch_size": 4}])
def test_rows_with_a_length_are_trained_for_so_many_steps_too(settings: dict[str, Any]) -> None:
    result = cofiprune.finetune(bert(), new_rows(20), max_steps=11, **QUICK, **settings)
    assert result.history[-1]["step"] == 11
    result = cofiprune.prune(
        bert(), new_rows(24), target_sparsity=0.4, max_steps=5, eval_steps=2, eval_dataset=new_rows(8), **QUICK,
        **settings,
    )  # fmt: skip
    assert result.history[-1]["step"] == 5
    assert len([entry for entry in result.history if "eval_loss" in entry]) >= 3


def test_the_rows_are_those_of_the_stream_in_its_order() -> None:
    rows = new_rows(16)
    one = cofiprune.finetune(bert(), Endless(rows), max_steps=6, **QUICK)
    loader = DataLoader(rows, batch_size=8, collate_fn=lambda chosen: chosen)
    from cofiprune.data.prepare import prepare

    batches = [next(iter(prepare(chosen, bert(), batch_size=8))) for chosen in loader]
    other = cofiprune.finetune(bert(), DataLoader(batches, batch_size=None), epochs=3, progress=False, logging_steps=1)
    assert losses(one) == pytest.approx(losses(other), rel=1e-6)


def test_a_run_goes_on_at_its_row(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"teacher": "self", "max_steps": 8, "checkpoint_steps": 1, **QUICK}
    whole, stream = bert(), Endless(new_rows(20))
    expected = cofiprune.finetune(whole, stream, **settings)

    def stop(entry: dict[str, Any]) -> None:
        if entry["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cofiprune.finetune(bert(), stream, output_dir=tmp_path, callbacks=[stop], **settings)
    for other in ({"max_steps": 9}, {"train_dataset": Endless(new_rows(20, seed=1))}):
        given = {"train_dataset": stream, **settings, **other}
        with pytest.raises(CheckpointError):
            cofiprune.finetune(bert(), output_dir=tmp_path, resume=True, **given)
    again = bert()
    found = cofiprune.finetune(again, stream, output_dir=tmp_path, resume=True, **settings)
    assert losses(found) == losses(expected)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_no_more_rows_are_read_than_are_needed() -> None:
    stream = Endless(new_rows(24))
    cofiprune.finetune(bert(), stream, max_steps=4, **QUICK)
    assert stream.read < 4 * 8 + 200
    stream.read = 0
    cofiprune.prune(bert(), stream, target_sparsity=0.4, method="one-shot", progress=False)
    assert stream.read <= 3 * FIRST_ROWS


@pytest.mark.parametrize(
    "make", [Endless, Plain, lambda rows: itertools.cycle(rows), lambda rows: (row for row in rows)]
)
def test_what_trains_nothing_takes_the_first_rows(make: Any) -> None:
    rows = new_rows(40)
    found = cofiprune.evaluate(bert(), make(rows))
    if make is not Endless:
        assert found["accuracy"] == pytest.approx(cofiprune.evaluate(bert(), rows)["accuracy"], abs=1e-3)
    one = cofiprune.prune(
        bert(), make(rows), target_sparsity=0.4, method="one-shot", eval_dataset=make(rows), progress=False
    )
    assert one.sparsity == pytest.approx(0.4, abs=0.03)


def test_text_and_labels_by_name_come_from_a_stream(tmp_path: Path) -> None:
    from transformers import BertTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(35))]
    tokenizer = BertTokenizerFast(vocab={name: index for index, name in enumerate(names)})
    texts = [{"sentence": f"w{n % 30} w3", "label": ("no", "yes")[n % 2]} for n in range(20)]
    settings = {"tokenizer": tokenizer, "label_names": ["no", "yes"], "max_steps": 4, "teacher": "self", **QUICK}
    result = cofiprune.finetune(bert(), Plain(texts), eval_dataset=Plain(texts, 1), **settings)
    assert result.history[-1]["step"] == 4
    cached = cofiprune.teach(bert(), Plain(texts, 1), tmp_path / "rows.jsonl", tokenizer=tokenizer, progress=False)
    del settings["teacher"]
    rows = cofiprune.data.load_rows(cached)
    assert "logits_loss" in cofiprune.finetune(bert(), Plain(rows), **settings).history[-1]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"max_steps": None}, SettingsError, "a Endless, has no length: say how long to train by max_steps"),
        ({"train_dataset": (row for row in new_rows(8))}, SettingsError, "a generator, which gives its rows only once"),
        ({"train_dataset": Endless([], 1)}, DataError, "train_dataset: there are no rows"),
        ({"train_dataset": Endless(unlabelled(8))}, DataError, "train_dataset: the rows have no 'labels'"),
        ({"train_dataset": Endless([{"input_ids": [99], "labels": 1}])}, DataError, "train_dataset: .*token id 99"),
        ({"train_dataset": DataLoader(Endless(new_rows(8)))}, DataError, "pass the data set itself, with max_steps"),
        ({"unlabelled_dataset": unlabelled(8), "teacher": "self"}, DataError, "unlabelled_dataset: a stream cannot"),
        ({"train_dataset": new_rows(8), "unlabelled_dataset": Endless(unlabelled(8)), "teacher": "self"}, DataError,
         "unlabelled_dataset: a stream cannot"),
        ({"epochs": 0}, SettingsError, "max_steps=4 trains nothing"),
        ({"max_steps": 0}, SettingsError, "max_steps=0"),
    ],
)  # fmt: skip
def test_what_is_refused(arguments: dict[str, Any], error: type[CofipruneError], words: str) -> None:
    given = {"train_dataset": Endless(new_rows(24)), "max_steps": 4, **QUICK, **arguments}
    with pytest.raises(error, match=words):
        cofiprune.finetune(bert(), **given)


def test_a_row_at_fault_is_told_by_its_batch() -> None:
    rows = [*new_rows(60), {"input_ids": [99], "labels": 0}]
    model = bert()
    with pytest.raises(DataError, match="in batch 7: .*token id 99"):
        cofiprune.finetune(model, Endless(rows), max_steps=20, **QUICK)


PROGRAM = """
import json, os
import torch
import cofiprune, toy

class Rows:
    def __init__(self, rows):
        self.rows = rows
    def __iter__(self):
        return iter(self.rows)

out, size, kind = sys.argv[1:]
name, labels = ("BertForSequenceClassification", {"labels": lambda ids: {"labels": len(ids) / 10}})
model, teacher = (toy.bert(name, seed=seed, num_labels=1).double() for seed in (1, 2))
rows = toy.rows(30, **labels)
more = {"stream": {"max_steps": 6}, "mixed": {"unlabelled_dataset": toy.unlabelled(13), "epochs": 2}}[kind]
result = cofiprune.finetune(model, Rows(rows) if kind == "stream" else rows, teacher=teacher, batch_size=int(size),
                            learning_rate=1e-3, progress=False, logging_steps=1, output_dir=out, dropout=False, **more)
torch.save([entry["loss"] for entry in result.history if "loss" in entry], f"{out}/{os.environ.get('RANK', '0')}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stream", "mixed"])
def test_several_processes_train_as_one(kind: str, tmp_path: Path) -> None:
    outputs(launch(PROGRAM, str(tmp_path / "one"), "8", kind))
    outputs(launch(PROGRAM, str(tmp_path / "two"), "4", kind, processes=2))
    one, two, other = (torch.load(tmp_path / name, weights_only=True) for name in ("one/0.pt", "two/0.pt", "two/1.pt"))
    assert len(one) > 5
    assert one == pytest.approx(two, rel=1e-5)
    assert two == other

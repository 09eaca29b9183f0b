"""Rows without labels among others: only a teacher's outputs are learned of them, for every kind of head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

import cofiprune
from cofiprune.data.mixed import Mixed
from cofiprune.data.prepare import prepare
from cofiprune.errors import CheckpointError, CofipruneError, DataError, SettingsError
from cofiprune.training.config import PruneConfig
from cofiprune.training.objective import Objective
from cofiprune.training.resolved import Facts, resolve
from toy import bert, spans, unlabelled
from toy import rows as new_rows

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 16, "progress": False}
HEADS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "classes": ("BertForSequenceClassification", lambda ids: {"labels": ids[0] % 2}, {}),
    "numbers": ("BertForSequenceClassification", lambda ids: {"labels": len(ids) / 10}, {"num_labels": 1}),
    "several": (
        "BertForSequenceClassification",
        lambda ids: {"labels": [1.0, 0.0, float(len(ids) % 2)]},
        {"num_labels": 3, "problem_type": "multi_label_classification"},
    ),
    "tags": ("BertForTokenClassification", lambda ids: {"labels": [token % 2 for token in ids]}, {}),
    "words": ("BertForMaskedLM", lambda ids: {"labels": list(ids)}, {}),
    "spans": ("BertForQuestionAnswering", spans, {}),
}


class Lazy(torch.utils.data.Dataset[Any]):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def padding(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A collator that takes rows with labels and rows without."""
    width = max(len(row["input_ids"]) for row in rows)
    batch = {}
    for name, cell in rows[0].items():
        per_token = isinstance(cell, list) and len(cell) == len(rows[0]["input_ids"])
        fill = -100 if name == "labels" else 0
        batch[name] = torch.tensor(
            [[*row[name], *[fill] * (width - len(row[name]))] if per_token else row[name] for row in rows]
        )
    return {**batch, "attention_mask": (batch["input_ids"] != 0).long()}


@pytest.mark.parametrize("how", ["rows", "collator"])
@pytest.mark.parametrize("kind", HEADS)
def test_labels_count_of_the_rows_that_have_them(kind: str, how: str) -> None:
    name, labels, changes = HEADS[kind]
    model, teacher = (bert(name, seed=seed, **changes).eval() for seed in (0, 1))
    own, bare = new_rows(6, labels=labels), unlabelled(5, seed=1)
    collator = padding if how == "collator" else None
    wrong = new_rows(5, seed=1, labels=lambda ids: {"labels": 7, "start_positions": 1})
    settings = resolve(PruneConfig(distill_layers_weight=0), Facts(1, taught=True))
    losses, counts = [], []
    for extra in ([], bare, wrong):
        mixed = Mixed(own, extra) if extra else own
        batches = prepare(mixed, model, batch_size=64, shuffle=True, collator=collator)
        objective = Objective(model, teacher, batches, settings)
        (batch,) = batches
        assert len(batch["input_ids"]) == 6 + len(extra)
        with torch.no_grad():
            losses.append(objective(model, batch, None))
        counts.append(objective.counts(batch)["label_loss"])
    assert len(set(counts)) == 1
    alone, among, ignored = losses
    assert float(among["label_loss"]) == pytest.approx(float(alone["label_loss"]), rel=1e-5)
    assert float(among["logits_loss"]) != pytest.approx(float(alone["logits_loss"]), rel=1e-4)
    assert float(ignored["loss"]) == float(among["loss"])


@pytest.mark.parametrize("how", ["finetune", "auto", "cofi", "one-shot"])
@pytest.mark.parametrize("kind", ["classes", "numbers", "tags", "spans", "states"])
def test_runs_take_rows_without_labels(kind: str, how: str) -> None:
    name, labels, changes = HEADS.get(kind, ("BertModel", lambda ids: {}, {}))
    model = bert(name, **changes)
    data = {"train_dataset": new_rows(32, labels=labels), "unlabelled_dataset": unlabelled(32, seed=3)}
    if how == "finetune":
        result = cofiprune.finetune(model, **data, teacher=bert(name, seed=1, **changes), **QUICK)
        assert max(entry["step"] for entry in result.history) == 4
    else:
        more = {"finetune_epochs": 1} if how == "one-shot" else {"teacher": "self"}
        result = cofiprune.prune(model, **data, target_sparsity=0.4, method=how, **more, **QUICK)
        assert result.sparsity == pytest.approx(0.4, abs=0.03)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_images_and_rows_that_are_read_late() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes))
    images = [{"pixel_values": torch.randn(3, 8, 8), "labels": n % 2} for n in range(12)]
    bare = Lazy([{"pixel_values": torch.randn(3, 8, 8)} for _ in range(8)])
    result = cofiprune.finetune(model, images, unlabelled_dataset=bare, teacher="self", **QUICK)
    assert torch.isfinite(torch.tensor(result.history[-1]["loss"]))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"teacher": None}, SettingsError, "unlabelled_dataset: .*teacher"),
        ({"train_dataset": None}, SettingsError, "adds to the rows of a train_dataset"),
        ({"unlabelled_dataset": []}, DataError, "unlabelled_dataset: there are no rows"),
        ({"unlabelled_dataset": [{"input_ids": [2, 99]}]}, DataError, "unlabelled_dataset: row 0: token id 99"),
        (
            {"unlabelled_dataset": [{"input_ids": [2, 9], "position_ids": [0, 1]}]},
            DataError,
            "unlabelled_dataset: its rows have 'position_ids', which not those",
        ),
        ({"unlabelled_dataset": DataLoader([{"input_ids": torch.tensor([2])}])}, DataError, "not as a DataLoader"),
        ({"unlabelled_dataset": ["some text"]}, DataError, "unlabelled_dataset: .*tokenizer"),
        ({"distill_logits_weight": 0, "distill_layers_weight": 0}, SettingsError, "unlabelled_dataset: nothing"),
    ],
)
@pytest.mark.parametrize("run", ["prune", "finetune"])
def test_what_is_refused(run: str, arguments: dict[str, Any], error: type[CofipruneError], words: str) -> None:
    given = {
        "train_dataset": new_rows(16), "unlabelled_dataset": unlabelled(16), "teacher": "self", **QUICK, **arguments,
        **({"target_sparsity": 0.4} if run == "prune" else {}),
    }  # fmt: skip
    if run == "finetune" and given["train_dataset"] is None:
        error, words = SettingsError, "finetune needs a train_dataset"
    with pytest.raises(error, match=words):
        getattr(cofiprune, run)(bert(), **given)


@pytest.mark.parametrize("typed", [0, 1])
def test_token_types_may_be_left_out(typed: int) -> None:
    data = [new_rows(16), unlabelled(16)]
    data[typed] = [{**row, "token_type_ids": [1] * len(row["input_ids"])} for row in data[typed]]
    (batch,) = prepare(Mixed(*data), bert(), batch_size=64)
    assert batch["token_type_ids"].any(1).sum() == 16


def test_a_run_is_resumed_with_the_same_rows_only(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"teacher": "self", **QUICK, "epochs": 2, "checkpoint_steps": 1, "logging_steps": 1}
    rows, bare = new_rows(16), unlabelled(16, seed=2)
    whole, stopped = bert(), bert()
    cofiprune.finetune(whole, rows, unlabelled_dataset=bare, **settings)

    def stop(entry: dict[str, Any]) -> None:
        if entry["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cofiprune.finetune(stopped, rows, unlabelled_dataset=bare, output_dir=tmp_path, callbacks=[stop], **settings)
    other = [*bare[:-1], {"input_ids": [2, 9]}]
    with pytest.raises(CheckpointError, match="another rows"):
        cofiprune.finetune(bert(), rows, unlabelled_dataset=other, output_dir=tmp_path, resume=True, **settings)
    again = bert()
    cofiprune.finetune(again, rows, unlabelled_dataset=bare, output_dir=tmp_path, resume=True, **settings)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_texts_and_a_collator_of_transformers() -> None:
    from transformers import BertTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(35))]
    tokenizer = BertTokenizerFast(vocab={name: index for index, name in enumerate(names)})
    texts = [{"text": f"w{n % 30} w3", "label": n % 2} for n in range(16)]
    for further in (["w1 w2", "w4"], [{"sentence": "w1 w2", "label": "unknown"}], [{"text": "w5", "label": ""}]):
        cofiprune.finetune(
            bert(), texts, unlabelled_dataset=further, teacher="self", tokenizer=tokenizer, text_column="text",
            label_column="label", **QUICK,
        )  # fmt: skip
    pads = DataCollatorWithPadding(tokenizer)
    tokens = [{**tokenizer(row["text"]), "labels": row["label"]} for row in texts]
    bare = [dict(tokenizer(text)) for text in ("w1 w2", "w5")]
    cofiprune.finetune(bert(), tokens, unlabelled_dataset=bare, teacher="self", data_collator=pads, **QUICK)

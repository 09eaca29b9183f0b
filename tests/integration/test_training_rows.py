"""Rows that cannot be read, labels none of which counts, and folders that are links."""

import pytest
import torch
from torch.utils.data import DataLoader

import cofiprune
from cofiprune.errors import CofipruneError, DataError, SettingsError
from cofiprune.masking import masks_of
from toy import collate, spans

QUICK = {"epochs": 1, "batch_size": 16, "progress": False}


class Late(torch.utils.data.Dataset):
    """Rows that are made when they are asked for; one cannot be made once training has begun."""

    def __init__(self, rows, *, bad=None):
        self.rows, self.bad, self.reads = rows, bad, 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.reads += 1
        if index == self.bad and self.reads > 3 * len(self.rows):
            raise LookupError("file gone")
        return self.rows[index]


def broken_later(rows, calls=[]):  # noqa: B006  # counts over all calls
    calls.append(len(rows))
    if len(calls) % 20 == 0:
        raise ZeroDivisionError("by the collator")
    return collate(rows)


@pytest.mark.parametrize("run", ["prune", "finetune"])
def test_errors_of_the_users_code_say_which_rows_and_leave_the_model(toy, run):
    settings = {"prune": {"target_sparsity": 0.5, "method": "cofi", "one_shot_share": 0}, "finetune": {}}[run]
    settings |= {"progress": False, "epochs": 8, "batch_size": 4}
    for arguments, error, words in (
        ({"data_collator": broken_later}, ZeroDivisionError, "among the rows ["),
        ({"data_collator": collate, "train_dataset": Late(toy.rows(16), bad=5)}, LookupError, "row 5"),
        (
            {"train_dataset": DataLoader(Late(toy.rows(16), bad=5), batch_size=4, collate_fn=collate)},
            LookupError,
            "in batch ",
        ),
    ):
        student = toy.student()
        before = toy.snapshot(student)
        with pytest.raises(error) as caught:
            getattr(cofiprune, run)(student, **{"train_dataset": toy.rows(16), **arguments, **settings})
        assert any(note.startswith(words) for note in caught.value.__notes__)
        assert masks_of(student) is None
        if run == "prune":
            assert toy.is_unchanged(student, before)


def ignored(rows):
    return [{**row, "labels": -100} for row in rows]


def spans_past_the_end(ids):
    return {"start_positions": 99, "end_positions": 99}


@pytest.mark.parametrize("how", ["rows", "tags", "spans", "collator", "loader"])
def test_labels_none_of_which_counts_are_refused_and_a_batch_of_them_is_fine(toy, how):
    name = {"tags": "BertForTokenClassification", "spans": "BertForQuestionAnswering"}.get(how)
    make = {"tags": lambda ids: {"labels": [-100] * len(ids)}, "spans": spans_past_the_end}.get(how)
    none, some = toy.rows(32, labels=make), toy.rows(32, seed=1, labels=None if make is None else good(how))
    if make is None:
        none = ignored(none)
    settings = {"progress": False, "epochs": 1, "batch_size": 4}

    def tuned(rows):
        model = toy.bert(name) if name else toy.bert()
        before = toy.snapshot(model)
        data = {"train_dataset": rows}
        if how == "collator":  # which makes the labels
            bare = [{"input_ids": row["input_ids"], "tag": row["labels"]} for row in rows]
            known = {tuple(row["input_ids"]): row["labels"] for row in rows}
            data = {
                "train_dataset": bare,
                "data_collator": lambda raw: collate(
                    [{**row, "labels": known[tuple(row["input_ids"])]} for row in raw]
                ),
            }
        elif how == "loader":
            data = {"train_dataset": DataLoader(rows, batch_size=4, collate_fn=collate)}
        try:
            return cofiprune.finetune(model, **data, **settings)
        except CofipruneError:
            assert toy.is_unchanged(model, before)
            raise

    with pytest.raises(CofipruneError, match="train_dataset: .*-100"):
        tuned(none)
    tuned([*none[:8], *some])
    if how in ("rows", "tags", "spans"):
        model = toy.bert(name) if name else toy.bert()
        with pytest.raises(DataError, match="nothing to measure"):
            cofiprune.evaluate(model, none)
        result = cofiprune.finetune(model, none, teacher=toy.bert(name, seed=1) if name else toy.teacher, **settings)
        assert result.settings.label_weight == 0


def good(how):
    return spans if how == "spans" else lambda ids: {"labels": [token % 2 for token in ids]}


def test_an_output_folder_may_be_a_link_and_its_checkpoints_links(toy, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "else")
    with pytest.raises(SettingsError, match="cannot be written to"):
        cofiprune.finetune(toy.student(), toy.rows(8), output_dir=tmp_path / "dangling", **QUICK)

    def moved(entry):  # to another disk, say
        for path in (tmp_path / "real").glob("checkpoint-*"):
            if not path.is_symlink() and (path / "meta.json").exists():
                path.rename(tmp_path / path.name)
                path.symlink_to(tmp_path / path.name)

    settings = {"progress": False, "epochs": 4, "batch_size": 4, "checkpoint_steps": 1, "logging_steps": 1}
    cofiprune.finetune(toy.student(), toy.rows(8), output_dir=tmp_path / "link", callbacks=[moved], **settings)
    assert len(list((tmp_path / "real").glob("checkpoint-*"))) == 2

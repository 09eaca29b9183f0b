"""A run goes on with what it was begun with, or not at all; and it writes where it can, or says so beforehand."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers

import cofiprune
import small
import toy
from cofiprune.errors import CheckpointError, PlanError, SettingsError, StorageError
from cofiprune.masking import masks_of
from cofiprune.training import checkpoint

SETTINGS = {
    "target_sparsity": 0.5,
    "method": "one-shot",
    "finetune_epochs": 2,
    "batch_size": 16,
    "checkpoint_steps": 2,
    "progress": False,
}


def student(seed=0, **changes):
    return toy.bert(seed=seed, **changes).eval()


def prune(folder, *, model=None, rows=None, **changes):
    arguments = {"teacher": student(1), **SETTINGS, "output_dir": folder, **changes}
    return cofiprune.prune(model or student(), toy.rows(32) if rows is None else rows, **arguments)


def flipped(rows):
    return [{**row, "labels": 1 - row["labels"]} for row in rows]


ROWS = toy.rows(32)
ALTERED = {
    "other rows": lambda: {"rows": toy.rows(32, seed=3)},
    "reversed rows": lambda: {"rows": ROWS[::-1]},
    "flipped labels": lambda: {"rows": flipped(ROWS)},
    "one other token": lambda: {"rows": [{**ROWS[0], "input_ids": [*ROWS[0]["input_ids"][:-1], 3]}, *ROWS[1:]]},
    "another student": lambda: {"model": student(4)},
    "another teacher": lambda: {"teacher": student(5)},
    "another dtype": lambda: {"model": student().double()},
    "another activation": lambda: {"model": student(hidden_act="relu")},
    "another setting": lambda: {"finetune_learning_rate": 1e-3},
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    prune(folder)
    return folder


@pytest.mark.parametrize("altered", ALTERED)
def test_a_run_does_not_go_on_with_anything_else(begun, altered):
    with pytest.raises(CheckpointError, match="is of another run"):
        prune(begun, resume=True, **ALTERED[altered]())


def test_a_run_goes_on_with_the_same_from_anywhere(begun):
    rows = [{name: torch.tensor(value).tolist() for name, value in row.items()} for row in toy.rows(32)]
    assert prune(begun, resume=True, rows=rows).plan == prune(begun, resume="auto").plan


def test_the_best_is_not_chosen_by_two_sets(tmp_path):
    best = {"metric_for_best_model": "accuracy", "eval_dataset": toy.rows(16, seed=5)}
    prune(tmp_path, **best)
    prune(tmp_path, resume=True, **best)
    with pytest.raises(CheckpointError, match="another eval_rows"):
        prune(tmp_path, resume=True, **{**best, "eval_dataset": toy.rows(16, seed=6)})


def test_another_version_is_another_run(begun, monkeypatch):
    monkeypatch.setattr("cofiprune.training.identity.version", lambda name: "9.9")
    with pytest.raises(CheckpointError, match=r"its cofiprune is '.*', asked for '9.9'"):
        prune(begun, resume=True)


def test_a_sweep_does_not_go_on_with_another_model(tmp_path):
    prune(tmp_path, target_sparsity=[0.3, 0.5], finetune_epochs=1)
    with pytest.raises(CheckpointError, match="another model"):
        prune(tmp_path, target_sparsity=[0.3, 0.5], finetune_epochs=1, model=student(7), resume=True)
    point = tmp_path / "sparsity-0.5" / "point.json"
    point.write_text(point.read_text().replace('"sparsity": 0.', '"sparsity": 0.1'))
    with pytest.raises(CheckpointError, match="damaged; delete it"):
        prune(tmp_path, target_sparsity=[0.3, 0.5], finetune_epochs=1, resume="auto")


def test_rows_that_change_each_time_are_known_by_their_number(tmp_path):
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 32

        def __getitem__(self, index):
            return {**ROWS[index], "labels": int(torch.randint(2, ()))}

    def collate(rows):
        return toy.collate(rows)

    prune(tmp_path, rows=Noisy(), data_collator=collate)
    prune(tmp_path, rows=Noisy(), data_collator=collate, resume=True)


@pytest.mark.parametrize("resume", [True, False, "auto"])
def test_what_a_kill_left_of_a_first_checkpoint_is_in_nobodys_way(tmp_path, resume):
    cut_off = tmp_path / "checkpoint-2"
    cut_off.mkdir()
    (cut_off / "state.pt.partial").write_bytes(b"half of")
    if resume is True:
        with pytest.raises(CheckpointError, match="nothing to resume"):
            prune(tmp_path, resume=resume)
    else:
        assert prune(tmp_path, resume=resume).plan == prune(None).plan


def test_a_folder_that_cannot_be_written_to_is_refused_first(tmp_path):
    (tmp_path / "file").write_text("")
    model = student()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SettingsError, match="cannot be written to"):
        prune(tmp_path / "file" / "run", model=model)
    assert small.is_unchanged(model, before)


def test_a_full_disk_leaves_the_model_as_ctrl_c_does(tmp_path, monkeypatch):
    written = []

    def full(target, path):
        written.append(path)
        if len(written) > 2:
            raise RuntimeError("PytorchStreamWriter failed writing file: file write failed")
        return save(target, path)

    save = torch.save
    monkeypatch.setattr(checkpoint.torch, "save", full)
    model = student()
    with pytest.raises(StorageError, match="cannot be written"):
        prune(tmp_path, model=model)
    monkeypatch.undo()
    assert masks_of(model) is not None
    assert masks_of(model).sparsity() == pytest.approx(0.5, abs=0.01)
    # Whoever makes room goes on with the model that was left, and ends where nobody ran out of it.
    result = prune(tmp_path, model=model, resume=True)
    whole = prune(None)
    assert small.is_unchanged(result.model, whole.model.state_dict())


def test_a_result_hands_out_its_own_plan_or_an_error():
    model = student()
    first = prune(None, model=model, finetune_epochs=0)
    whole = cofiprune.summary(first.compact()).layer_parameters
    masks_of(model).detach()
    assert cofiprune.summary(first.compact()).layer_parameters == whole
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prune(None, model=model, finetune_epochs=0, target_sparsity=0.3)
    with pytest.raises(PlanError, match="pruned again"):
        first.compact()


@pytest.mark.parametrize("compacted", [False, True])
def test_digests_do_not_see_where_a_model_came_from(compacted, tmp_path):
    from cofiprune.training.identity import digest_of_model

    model = student()
    if compacted:
        with cofiprune.attach(model) as masks:
            masks["layers.0.ffn"] = [0]
            model = cofiprune.compact(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert digest_of_model(model) == digest_of_model(loaded)
    loaded.config.hidden_act = "relu"
    assert digest_of_model(model) != digest_of_model(loaded)

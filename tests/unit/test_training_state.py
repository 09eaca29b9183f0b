"""Checkpoints: complete or not there, exact, and refused with a reason when they do not fit."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from cofiprune.errors import CheckpointError
from cofiprune.training.checkpoint import FORMAT_VERSION, has_checkpoints, load_checkpoint, save_checkpoint
from cofiprune.training.state import RunState, Sums

IDENTITY = {"method": "prune", "target_sparsity": 0.5, "config": {"epochs": 2.0, "units": ["head"], "seed": 1}}


def state(*, phase="prune", width=3, projection=True, seed=0, steps=2):
    torch.manual_seed(seed)
    modules = {"model": nn.Linear(width, 2)}
    if projection:
        modules["projection"] = nn.Linear(2, 2)
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    found = RunState(phase, modules, torch.optim.AdamW(parameters, lr=0.1))
    for _ in range(steps):
        modules["model"](torch.randn(4, width)).sum().backward()
        found.optimizer.step()
        found.optimizer.zero_grad()
        found.step += 1
    found.total_steps, found.batches_seen, found.seconds = 10 + found.step, 2 * found.step, 1.5
    found.history = [{"step": 1, "loss": 0.25, "phase": phase}]
    found.sums = Sums({"loss": torch.tensor(3.0)}, 2)
    found.best = {"value": 0.5, "step": 1, "model": {"weight": torch.ones(2, 3)}}
    found.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**seed)
    found.extra = {"plan": {"keep": [1, 2]}}
    return found


def flat(captured):
    """Everything in a state as comparable values."""
    if isinstance(captured, torch.Tensor):
        return captured.tolist()
    if isinstance(captured, dict):
        return {str(name): flat(value) for name, value in captured.items()}
    return [flat(value) for value in captured] if isinstance(captured, list | tuple) else captured


def test_what_is_saved_is_what_is_restored(tmp_path):
    first = state()
    folder = save_checkpoint(tmp_path, first, IDENTITY)
    assert folder == tmp_path / "checkpoint-12"
    assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "rng-0.pt", "state.pt"]
    saved = load_checkpoint(tmp_path, IDENTITY)
    assert (saved.folder, saved.phase, saved.extra) == (folder, "prune", first.extra)
    second = state(seed=1, steps=0)
    second.restore(saved.captured)
    assert flat(second.capture()) == flat(first.capture())
    # The optimiser's moments too: the next step is the same.
    for each in (first, second):
        each.modules["model"](torch.ones(4, 3)).sum().backward()
        each.optimizer.step()
    assert torch.equal(first.modules["model"].weight, second.modules["model"].weight)


def test_random_numbers_go_on_where_they_were(tmp_path):
    for generator in (torch.manual_seed, random.seed, np.random.seed):
        generator(5)
    torch.randn(3), random.random(), np.random.randn(3), random.gauss(0, 1)
    save_checkpoint(tmp_path, state(steps=0), IDENTITY)
    wanted = [torch.randn(3).tolist(), random.random(), random.gauss(0, 1), np.random.randn(3).tolist()]
    for generator in (torch.manual_seed, random.seed, np.random.seed):
        generator(6)
    saved = load_checkpoint(tmp_path, IDENTITY)
    saved.restore_rng()
    assert [torch.randn(3).tolist(), random.random(), random.gauss(0, 1), np.random.randn(3).tolist()] == wanted
    with pytest.raises(CheckpointError, match=r"rng-1\.pt"):
        saved.restore_rng(1)
    (saved.folder / "rng-0.pt").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"damaged: its rng-0\.pt"):
        saved.restore_rng()


def test_only_the_newest_are_kept(tmp_path):
    current = state()
    for total in (8, 9, 10, 11):  # 9 before 10: by number, not by name
        current.total_steps = total
        save_checkpoint(tmp_path, current, IDENTITY)
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / "my-checkpoint-99").mkdir()
    (tmp_path / "checkpoint-98-old").mkdir()
    assert load_checkpoint(tmp_path, IDENTITY).folder.name == "checkpoint-11"
    assert sorted(path.name for path in tmp_path.glob("checkpoint-??")) == ["checkpoint-10", "checkpoint-11"]


def test_a_checkpoint_without_its_last_file_is_none(tmp_path):
    current = state()
    for total in (5, 6):
        current.total_steps = total
        save_checkpoint(tmp_path, current, IDENTITY)
    (tmp_path / "checkpoint-6" / "meta.json").unlink()
    assert load_checkpoint(tmp_path, IDENTITY).folder.name == "checkpoint-5"
    shutil.rmtree(tmp_path / "checkpoint-5")
    assert not has_checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match=r"nothing to resume.*resume='auto'"):
        load_checkpoint(tmp_path, IDENTITY)


@pytest.mark.parametrize("name", ["state.pt", "rng-0.pt", "meta.json"])
def test_one_flipped_bit_is_noticed_and_the_checkpoint_before_counts(tmp_path, name):
    current = state()
    for total in (5, 6):
        current.total_steps = total
        save_checkpoint(tmp_path, current, IDENTITY)
    file = tmp_path / "checkpoint-6" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=r"checkpoint-6 is damaged.*goes on from checkpoint-5"):
        assert load_checkpoint(tmp_path, IDENTITY).folder.name == "checkpoint-5"
    shutil.rmtree(tmp_path / "checkpoint-5")
    with pytest.raises(CheckpointError, match="checkpoint-6 is damaged"):
        load_checkpoint(tmp_path, IDENTITY)


def test_nothing_there(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        assert not has_checkpoints(folder)
        with pytest.raises(CheckpointError, match="nothing to resume"):
            load_checkpoint(folder, IDENTITY)


def test_only_the_first_process_completes_a_checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-12"
    save_checkpoint(tmp_path, state(), IDENTITY, rank=1)
    assert list(folder.iterdir()) == [folder / "rng-1.pt"]
    save_checkpoint(tmp_path, state(), IDENTITY)
    assert (folder / "meta.json").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["damaged", "meta.json"]),
        ("{", ["damaged", "meta.json"]),
        ("[1]", ["damaged", "meta.json"]),
        ("{}", ["damaged", "checksum"]),
        ('{"format_version": null}', ["damaged"]),
        (f'{{"format_version": {FORMAT_VERSION}}}', ["damaged", "checksum"]),
        ('{"format_version": 1}', ["format 1", "older", "resume=False"]),
        (f'{{"format_version": {FORMAT_VERSION + 1}}}', [f"format {FORMAT_VERSION + 1}", "newer", str(FORMAT_VERSION)]),
    ],
)
def test_damaged_and_newer_descriptions(tmp_path, text, words):
    folder = save_checkpoint(tmp_path, state(), IDENTITY)
    (folder / "meta.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path, IDENTITY)
    assert str(folder) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "missing", "other", "pickle"])
def test_damaged_tensors(tmp_path, damage):
    folder = save_checkpoint(tmp_path, state(), IDENTITY)
    path = folder / "state.pt"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "missing":
        path.unlink()
    elif damage == "other":
        torch.save([1, 2], path)
    else:
        torch.save({"phase": random.Random(1)}, path)  # nothing but plain values and tensors is ever unpickled
    with pytest.raises(CheckpointError, match=r"damaged: state\.pt (is not as it was written|cannot be read)"):
        load_checkpoint(tmp_path, IDENTITY)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "finetune"}, ["method", "'prune'", "'finetune'"]),
        ({"target_sparsity": 0.6}, ["target_sparsity", "0.5", "0.6"]),
        ({"config": {"epochs": 3.0, "units": ["head"], "seed": 1}}, ["epochs", "2.0", "3.0"]),
        ({"config": {"epochs": 2.0, "units": None, "seed": 1}}, ["units", "head", "None"]),
        ({"config": {"epochs": 2.0, "units": ["head"]}}, ["seed", "1", "None"]),
        ({"rows": 7}, ["rows", "None", "7"]),
    ],
)
def test_another_run_is_told_by_the_first_thing_that_differs(tmp_path, change, words):
    save_checkpoint(tmp_path, state(), IDENTITY)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path, {**IDENTITY, **change})
    message = str(caught.value)
    assert "of another run" in message
    assert "resume=False" in message
    for word in words:
        assert word in message
    assert len(message) < 400  # not two whole configurations


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"phase": "recover"}, ["phase", "'prune'", "'recover'"]),
        ({"width": 4}, ["'weight'", "[2, 3]", "[2, 4]"]),
        ({"projection": False}, ["model, projection", "teacher"]),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(tmp_path, other, words):
    save_checkpoint(tmp_path, state(), IDENTITY)
    captured = load_checkpoint(tmp_path, IDENTITY).captured
    wrong = state(seed=3, **other)
    before = json.dumps(flat(wrong.capture()))
    with pytest.raises(CheckpointError) as caught:
        wrong.restore(captured)
    for word in words:
        assert word in str(caught.value)
    assert json.dumps(flat(wrong.capture())) == before


def test_other_trained_parameters_do_not_fit(tmp_path):
    save_checkpoint(tmp_path, state(), IDENTITY)
    captured = load_checkpoint(tmp_path, IDENTITY).captured
    fewer = state(seed=3)
    fewer.optimizer = torch.optim.AdamW(fewer.modules["model"].parameters())
    before = fewer.modules["model"].weight.clone()
    with pytest.raises(CheckpointError, match="4 parameters, this one 2"):
        fewer.restore(captured)
    assert torch.equal(fewer.modules["model"].weight, before)


def test_a_state_without_one_of_its_parts_is_damaged(tmp_path):
    save_checkpoint(tmp_path, state(), IDENTITY)
    captured = load_checkpoint(tmp_path, IDENTITY).captured
    for name in captured:
        part = {key: value for key, value in captured.items() if key != name}
        with pytest.raises(CheckpointError, match=f"damaged: it has no '{name}'"):
            state().restore(part)

"""A run that is stopped, killed or fails goes on where its last checkpoint is, and ends as if nothing had happened."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import cofiprune
from cofiprune.errors import CheckpointError, TrainingError
from cofiprune.masking import masks_of
from cofiprune.measure.evaluation import evaluate
from processes import launch, outputs
from toy import assert_masked_is_compacted, collate, without_times

ROWS = 48  # 3 batches an epoch
PRUNING, RECOVERY = 6, 9  # optimiser steps: a quarter of 3 epochs, and 2 epochs more


pytestmark = pytest.mark.usefixtures("started_by_hand")


def settings_of(toy, **changes):
    return {
        "target_sparsity": 0.6, "teacher": toy.teacher, "eval_dataset": toy.rows(16, seed=2), "epochs": 3,
        "freeze_epochs": 1, "finetune_epochs": 2, "batch_size": 16, "learning_rate": 2e-3, "logging_steps": 4,
        "checkpoint_steps": 2, "progress": False, **changes,
    }  # fmt: skip


def prune(toy, student=None, rows=None, **changes):
    return cofiprune.prune(student or toy.student(), rows or toy.rows(ROWS), **settings_of(toy, **changes))


def signals_at(step, number=signal.SIGINT, times=1):
    """A callback that sends this process a signal after a step."""
    left = [times]

    def called(entry):
        if entry["step"] >= step and left[0]:
            left[0] -= 1
            os.kill(os.getpid(), number)

    return called


def assert_same_run(one, other):
    assert one.plan == other.plan
    assert without_times(one.history) == without_times(other.history)
    assert one.best_step == other.best_step
    pairs = zip(one.model.state_dict().items(), other.model.state_dict().items(), strict=True)
    assert all(torch.equal(ours, theirs) for (_, ours), (_, theirs) in pairs)


@pytest.fixture(scope="module")
def whole(toy):
    """The run without a stop."""
    result = prune(toy, logging_steps=1)
    assert [entry["step"] for entry in result.history if "loss" in entry] == list(range(1, PRUNING + RECOVERY + 1))
    return result


def test_a_run_that_is_stopped_again_and_again_ends_in_the_same_weights_to_the_bit(toy, whole, tmp_path):
    settings = {"logging_steps": 1, "output_dir": tmp_path}
    for stop in (1, 3, 6, 7, 12, 15):
        with pytest.raises(KeyboardInterrupt, match=f"after step {stop};"):
            prune(toy, callbacks=[signals_at(stop)], resume=stop > 1, **settings)
        torch.manual_seed(99)
    assert_same_run(prune(toy, resume=True, **settings), whole)
    # What is finished is only read.
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("checkpoint-*/*")}
    assert_same_run(prune(toy, resume=True, **settings), whole)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("checkpoint-*/*")} == files
    assert len({path.parent for path in files}) == 2  # older ones are dropped
    assert not list(tmp_path.glob("checkpoint-*/*.partial"))


VARIANTS = {
    "dropout": {"dropout": True},
    "bf16": {"mixed_precision": "bf16"},
    "its own teacher": {"teacher": "self"},
    "no memory of the teacher": {"teacher_memory_mb": 0},
    "accumulation": {"gradient_accumulation_steps": 2, "batch_size": 8},
    "the best by a metric": {"metric_for_best_model": "loss", "eval_steps": 1, "finetune_learning_rate": 3e-2},
    "warm start": {"warm_start": True, "pre_finetune_epochs": 1},
    "other batches after pruning": {"finetune_batch_size": 24, "epochs": 1, "freeze_epochs": 0.4, "finetune_epochs": 5},
    "a loader that shuffles": {},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_is_stopped_twice_ends_in_the_same_weights_whatever_its_settings(toy, variant, tmp_path):
    def run(student=None, **changes):
        rows = toy.rows(ROWS)
        if variant == "a loader that shuffles":
            rows = DataLoader(rows, batch_size=16, shuffle=True, collate_fn=collate)
        return prune(toy, student, rows, **VARIANTS[variant], **changes)

    undisturbed, student = run(), toy.student()
    with pytest.raises(KeyboardInterrupt):
        run(student, callbacks=[signals_at(5)], output_dir=tmp_path)
    assert masks_of(student) is not None
    torch.manual_seed(99)
    # The stopped model may itself be handed in to go on, or another.
    with pytest.raises(KeyboardInterrupt):
        run(student, callbacks=[signals_at(11)], output_dir=tmp_path, resume=True)
    if variant == "its own teacher":
        result = run(student, output_dir=tmp_path, resume=True)
        assert result.model is student
    else:
        result = run(output_dir=tmp_path, resume=True)
    assert_same_run(result, undisturbed)


@pytest.mark.parametrize("state", ["dense", "masked", "compacted"])
def test_finetuning_is_resumed_too(toy, state, tmp_path):
    def student():
        model = toy.student()
        structure = cofiprune.structure(model)
        values = {name: torch.ones(group.size) for name, group in structure.items()}
        values["hidden"][:5] = 0
        values["layers.0.heads"][1] = 0.5
        plan = cofiprune.Plan.from_values(structure, values)
        if state == "masked":
            cofiprune.attach(model).set_plan(plan)
        return cofiprune.compact(model, plan) if state == "compacted" else model

    def run(model, **changes):
        settings = {"teacher": toy.teacher, "epochs": 3, "batch_size": 16, "checkpoint_steps": 2, "logging_steps": 4}
        return cofiprune.finetune(model, toy.rows(ROWS), progress=False, **settings, **changes)

    with pytest.raises(KeyboardInterrupt):
        run(student(), output_dir=tmp_path, callbacks=[signals_at(4)])
    if state == "masked":
        with pytest.raises(CheckpointError, match="other masks"):
            run(toy.student(), output_dir=tmp_path, resume=True)
    assert_same_run(run(student(), output_dir=tmp_path, resume=True), run(student()))


@pytest.mark.parametrize(
    ("number", "stop", "folder"),
    [(signal.SIGINT, 3, True), (signal.SIGINT, 9, False), (signal.SIGTERM, 3, False), (signal.SIGTERM, 9, True)],
)
def test_a_signal_saves_says_how_to_go_on_and_leaves_the_model_usable(toy, number, stop, folder, tmp_path):
    student = toy.student().train()
    handlers = [signal.getsignal(known) for known in (signal.SIGINT, signal.SIGTERM)]
    saved = {"output_dir": tmp_path / "new"} if folder else {}
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as caught:
        prune(toy, student, callbacks=[signals_at(stop, number)], logging_steps=1, **saved)
    message = str(caught.value)
    assert f"step {stop}" in message
    assert ("resume=True" in message and str(tmp_path / "new") in message) if folder else "nothing was saved" in message
    assert [signal.getsignal(known) for known in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert (tmp_path / "new" / f"checkpoint-{stop}" / "meta.json").exists() == folder
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    # What was reached so far is in the model: it runs, can be evaluated, compacted and trained on.
    assert_masked_is_compacted(student)
    assert evaluate(student, toy.rows(16))["loss"] > 0
    cofiprune.finetune(student, toy.rows(16), epochs=1, progress=False)


def test_a_second_signal_stops_at_once(toy, tmp_path):
    student = toy.student()
    calls = {"callbacks": [signals_at(3, times=2)], "output_dir": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        prune(toy, student, logging_steps=1, eval_steps=1, **calls)
    assert not (tmp_path / "checkpoint-3").exists()
    assert (tmp_path / "checkpoint-2" / "meta.json").exists()
    student(torch.tensor([[2, 5]])).logits.sum().backward()  # no random gates are left in it


def test_a_signal_after_the_last_step_is_not_lost(toy):
    student, seen = toy.student(), []

    def compute_metrics(prediction):
        if len(seen) == 3:  # the one-shot start and two steps
            os.kill(os.getpid(), signal.SIGINT)  # while the final plan is evaluated
        return {"count": float(len(seen))}

    calls = {"callbacks": [lambda entry: seen.append(entry) if "eval_loss" in entry else None]}
    settings = {"epochs": 2, "freeze_epochs": 0, "finetune_epochs": 0, "eval_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        prune(toy, student, toy.rows(16), compute_metrics=compute_metrics, **calls, **settings)
    assert masks_of(student).sparsity() == pytest.approx(0.6, abs=0.005)


def test_a_signal_in_the_one_shot_start_leaves_the_model_as_it_was(toy):
    student, passes = toy.student(), []
    before = toy.snapshot(student)

    def stops(module, args):
        passes.append(module)
        if len(passes) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    student.register_forward_pre_hook(stops)
    with pytest.raises(KeyboardInterrupt, match="one-shot stage"):
        prune(toy, student)
    assert masks_of(student) is None
    assert toy.is_unchanged(student, before)


def test_a_run_that_crashed_goes_on_from_its_last_whole_checkpoint(toy, whole, tmp_path):
    def crash(entry):
        if entry["step"] == 13:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        prune(toy, callbacks=[crash], logging_steps=1, output_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-12"]
    (tmp_path / "checkpoint-12" / "meta.json").unlink()  # it is written last
    assert_same_run(prune(toy, resume=True, logging_steps=1, output_dir=tmp_path), whole)


def test_how_often_it_saves_and_logs_may_change_when_it_goes_on(toy, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        prune(toy, callbacks=[signals_at(4)], output_dir=tmp_path)
    changed = {"logging_steps": 7, "checkpoint_steps": None, "eval_steps": 3, "progress": True}
    result = prune(toy, output_dir=tmp_path, resume=True, **changed)
    assert result.plan == whole.plan
    assert all(torch.equal(a, b) for a, b in zip(result.model.parameters(), whole.model.parameters(), strict=True))


def test_a_loss_that_is_no_number_stops_before_the_weights_are_lost(toy, tmp_path):
    student, seen = toy.student(), []
    before = toy.snapshot(student)
    student.register_forward_pre_hook(lambda module, args: seen.append(module))  # on what is made of it, too

    def poison(entry):
        if entry["step"] == 4:
            with torch.no_grad():
                seen[-1].classifier.bias.fill_(float("nan"))

    settings = {"logging_steps": 1, "one_shot_share": 0}
    with pytest.raises(TrainingError) as caught:
        prune(toy, student, callbacks=[poison], output_dir=tmp_path, **settings)
    assert masks_of(student) is None
    assert toy.is_unchanged(student, before)
    # The fourth step's own checkpoint would hold what the callback did, and is not written.
    assert all(word in str(caught.value) for word in ("step 4", "classifier.bias"))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert_same_run(prune(toy, resume=True, output_dir=tmp_path, **settings), prune(toy, **settings))


@pytest.mark.parametrize("saved", [True, False])
def test_a_rate_that_is_far_too_high_is_an_error_and_not_a_ruined_model(toy, saved, tmp_path):
    student = toy.student()
    before = toy.snapshot(student)
    settings = {"learning_rate": 1e30, "checkpoint_steps": 1, "batch_size": 8, "epochs": 4, "progress": False}
    with pytest.raises(TrainingError) as caught:
        cofiprune.finetune(student, toy.rows(ROWS), **settings, **({"output_dir": tmp_path} if saved else {}))
    assert all(word in str(caught.value) for word in ("step", "'finetune'", "learning_rate"))
    assert ("last good checkpoint" in str(caught.value)) == saved
    assert toy.is_unchanged(student, before)


PROGRAM = """
import json, os, warnings
warnings.simplefilter("error")
import torch
import cofiprune, toy
from cofiprune.training.run import Run

out, kill, resume, number, ranks = json.loads(sys.argv[1])

def log(run, values, log=Run.log):  # callbacks are called in the first process alone
    log(run, values)
    if kill and run.state.total_steps == kill and os.environ.get("RANK", "0") in ranks:
        os.kill(os.getpid(), number)

Run.log = log
student = toy.bert(seed=1)
result = cofiprune.prune(
    student, toy.rows(48), target_sparsity=0.6, teacher=toy.bert(seed=2, num_hidden_layers=3), epochs=3,
    freeze_epochs=1, finetune_epochs=1, batch_size=8, learning_rate=2e-3, logging_steps=1, checkpoint_steps=2,
    output_dir=out, resume=resume, progress=False,
    eval_dataset=toy.rows(8, seed=2), warm_start=True,
)
rank = os.environ.get("RANK", "0")
torch.save({"weights": student.state_dict(), "plan": result.plan.to_dict(), "sparsity": result.sparsity,
            "history": toy.without_times(result.history)}, f"{out}/final-{rank}.pt")
"""


def start(
    out: Path, *, count: int = 2, kill: int = 0, resume: bool = False, number: int = signal.SIGKILL, ranks: str = "01"
) -> list[subprocess.Popen[str]]:
    """A run that sends itself a signal after a step, in the processes named."""
    out.mkdir(exist_ok=True)
    return launch(PROGRAM, json.dumps([str(out), kill, resume, int(number), ranks]), processes=count)


def finals_of(out: Path, running: list[subprocess.Popen[str]]) -> list[dict]:
    outputs(running)
    return [torch.load(out / f"final-{rank}.pt", weights_only=True) for rank in range(len(running))]


def assert_same_weights(one: dict, other: dict) -> None:
    for name, value in one["weights"].items():
        assert torch.equal(other["weights"][name], value), name


@pytest.mark.slow
def test_a_run_goes_on_after_a_kill(tmp_path):
    (whole,) = finals_of(tmp_path / "whole", start(tmp_path / "whole", count=1))
    out = tmp_path / "killed"
    for kill in (7, 17):
        outputs(start(out, count=1, kill=kill, resume=kill > 7), code=-signal.SIGKILL)
    (killed,) = finals_of(out, start(out, count=1, resume=True))
    assert whole["history"] == killed["history"]
    assert whole["plan"] == killed["plan"]
    assert_same_weights(whole, killed)


@pytest.mark.slow
def test_two_processes_end_with_one_model(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    first, second = finals_of(whole, start(whole))
    assert abs(first["sparsity"] - 0.6) <= 0.005
    assert first["plan"] == second["plan"]
    assert_same_weights(first, second)
    assert first["history"] == second["history"]

    for process in start(stopped, kill=8):
        process.communicate(timeout=300)
    assert json.loads((stopped / "checkpoint-6" / "meta.json").read_text())["fingerprint"]["processes"] == 2
    for final in finals_of(stopped, start(stopped, resume=True)):
        assert_same_weights(first, final)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_of_them_at_the_same_step(tmp_path):
    texts = outputs(start(tmp_path, kill=8, number=signal.SIGTERM, ranks="1"), code=1)
    assert all("stopped by SIGTERM. Stopped after step 10" in text for text in texts), texts
    saved = {path.name for path in (tmp_path / "checkpoint-10").iterdir()}
    assert saved == {"state.pt", "meta.json", "rng-0.pt", "rng-1.pt"}


@pytest.mark.slow
@pytest.mark.parametrize("dead", ["0", "1"])
def test_the_death_of_one_process_ends_the_others_and_leaves_what_can_be_resumed(tmp_path, dead):
    running = start(tmp_path, kill=8, ranks=dead)
    texts = [process.communicate(timeout=60)[0] for process in running]
    codes = [process.returncode for process in running]
    assert codes[int(dead)] == -signal.SIGKILL
    assert codes[1 - int(dead)] == 1
    assert "another process of this run is gone" in texts[1 - int(dead)]
    assert "with resume=True" in texts[1 - int(dead)]
    complete = {path.parent.name for path in tmp_path.glob("*/meta.json")}
    assert complete == {"checkpoint-4", "checkpoint-6"}
    finals_of(tmp_path, start(tmp_path, resume=True))

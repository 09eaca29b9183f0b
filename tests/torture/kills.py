"""Kill runs at random moments and in the middle of writes, and let them go on: the end must be the same to the bit.

    python tests/torture/kills.py --trials 60 --seed 0

A trial forks a process that has everything imported, kills it with SIGKILL after a random share of the time that the
run takes, or at its n-th write to disk, up to three times over, and lets `resume="auto"` finish. The digest of weights,
plan and history is compared with that of a run that nobody stopped.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import cofiprune
from cofiprune.training import phases
from cofiprune.training import teach as teaching

SETTINGS = {"batch_size": 8, "checkpoint_steps": 2, "progress": False, "seed": 5}


def model_of(seed: int) -> BertForSequenceClassification:
    """A random classifier of three layers."""
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=60, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40)
    return BertForSequenceClassification(config)


def rows(count: int = 32) -> list[dict[str, Any]]:
    """Rows of different lengths, of two classes."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 12, (count,), generator=generator).tolist()
    drawn = [torch.randint(1, 60, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": ids, "labels": index % 2} for index, ids in enumerate(drawn)]


def pruned(folder: Path, **settings: Any) -> Any:
    """Prune the model of every trial, or go on with it."""
    return cofiprune.prune(
        model_of(0),
        rows(),
        teacher=model_of(1),
        output_dir=folder,
        resume="auto",
        **{**SETTINGS, **settings},
    )


def cofi(folder: Path) -> Any:
    accumulated = {"batch_size": 4, "gradient_accumulation_steps": 2}
    return pruned(folder, target_sparsity=0.6, method="cofi", epochs=3, finetune_epochs=2, **accumulated)


def shrinking(folder: Path) -> Any:
    began, shrunk = not folder.exists(), phases._shrunk
    cuts = []
    phases._shrunk = lambda run, learner, plan: cuts.append(plan) or shrunk(run, learner, plan)
    result = pruned(
        folder, target_sparsity=0.8, one_shot_share=0, epochs=12, sparsity_warmup_epochs=3, freeze_epochs=2,
        finetune_epochs=1, learning_rate=1e-3, gate_learning_rate=0.2, checkpoint_steps=3,
    )  # fmt: skip
    assert cuts or not began, "nothing shrinks in this run: its trials show nothing"
    return result


def gates(folder: Path) -> Any:
    return pruned(folder, target_sparsity=0.5, method="gates", epochs=3, finetune_epochs=1, one_shot_share=0.0)


def one_shot(folder: Path) -> Any:
    return pruned(folder, target_sparsity=0.6, method="one-shot", finetune_epochs=3)


def sweep(folder: Path) -> Any:
    return pruned(folder, target_sparsity=[0.3, 0.5, 0.7], method="one-shot", finetune_epochs=1)[-1]


def finetune(folder: Path) -> Any:
    model = model_of(0)
    return cofiprune.finetune(
        model,
        rows(),
        epochs=4,
        output_dir=folder,
        resume="auto",
        **SETTINGS,
    )


def collated(some: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch with padding."""
    ids = [torch.tensor(row["input_ids"]) for row in some]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    labels = torch.tensor([row["labels"] for row in some])
    return {"input_ids": padded, "attention_mask": (padded != 0).long(), "labels": labels}


def callback(folder: Path) -> Any:
    model = model_of(0)
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=4,
        per_device_train_batch_size=8,
        save_steps=2,
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
    )
    watching = cofiprune.PruningCallback(target_sparsity=0.5)
    trainer = Trainer(model, arguments, data_collator=collated, train_dataset=rows(), callbacks=[watching])
    # The Trainer writes its checkpoints file by file: what was cut off has no state of the callback yet.
    for cut_off in folder.glob("checkpoint-*") if folder.is_dir() else ():
        if not (cut_off / "cofiprune" / "meta.json").exists():
            shutil.rmtree(cut_off)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    return watching.result


def teach(folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    file = folder / "taught.jsonl"
    teaching.PART = 4
    return file if file.exists() else cofiprune.teach(model_of(1).eval(), rows(), file, batch_size=4, progress=False)


SCENARIOS: dict[str, Callable[[Path], Any]] = {
    "cofi": cofi,
    "shrinking": shrinking,
    "gates": gates,
    "one-shot": one_shot,
    "sweep": sweep,
    "finetune": finetune,
    "callback": callback,
    "teach": teach,
}


def digest(result: Any) -> str:
    """Of weights and plan, and of what the history says of losses; of a file, of what is in it."""
    if isinstance(result, Path):
        return hashlib.sha256(result.read_bytes()).hexdigest()
    found = hashlib.sha256(json.dumps(result.plan.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(result.model.state_dict().items()):
        found.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    history = getattr(result, "history", [])
    found.update(
        json.dumps(
            [{k: v for k, v in entry.items() if k != "seconds" and not k.startswith("train_")} for entry in history]
        ).encode()
    )
    return found.hexdigest()


def killing(at: int) -> None:
    """Let this process be killed at its n-th write to disk: before it, in the middle of it, or after it."""
    count = 0

    def patched(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def act(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == at and name != "replace":
                path = next((Path(each) for each in args if isinstance(each, str | os.PathLike)), None)
                if path is not None and at % 2 and name in ("save", "write_text"):
                    path.write_bytes(b"half of")
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, act)

    patched(os, "replace")
    patched(torch, "save")
    patched(pathlib.Path, "write_text")
    patched(pathlib.Path, "mkdir")
    patched(shutil, "rmtree")


def child(scenario: str, folder: Path, report: Path, at: int | None) -> int:
    """Run a scenario in a process of its own; returns its number."""
    pid = os.fork()
    if pid:
        return pid
    try:
        warnings.filterwarnings("ignore")
        transformers.utils.logging.disable_progress_bar()
        if at is not None:
            killing(at)
        result = SCENARIOS[scenario](folder)
        text = digest(result)
    except BaseException as error:  # whatever it is, it is the trial's result
        text = f"{type(error).__name__}: {error}"
    with open(report, "w", encoding="utf-8") as file:
        file.write(text)
    sys.stdout.flush()
    os._exit(0)


def finished(scenario: str, folder: Path, report: Path) -> tuple[str, float]:
    """Run a scenario to its end; returns what it reported, and its seconds."""
    report.unlink(missing_ok=True)
    began = time.perf_counter()
    os.waitpid(child(scenario, folder, report, None), 0)
    return report.read_text(encoding="utf-8"), time.perf_counter() - began


def trial(scenario: str, expected: str, seconds: float, draw: random.Random) -> tuple[list[str], str]:
    """Kill a run one to three times and let it finish; returns how it was killed, and what is wrong."""
    kills = []
    with tempfile.TemporaryDirectory() as place:
        folder, report = Path(place, "run"), Path(place, "report")
        for _ in range(draw.randint(1, 3)):
            report.unlink(missing_ok=True)
            at = draw.randint(1, 30) if draw.random() < 0.5 else None
            delay = draw.uniform(0, seconds)
            pid = child(scenario, folder, report, at)
            if at is None:
                time.sleep(delay)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills.append(f"write {at}" if at is not None else f"{delay:.2f} s")
            if report.exists():
                break
        found = report.read_text(encoding="utf-8") if report.exists() else finished(scenario, folder, report)[0]
    return kills, "" if found == expected else found


def main(arguments: list[str] | None = None) -> int:
    """Run the trials; returns how many went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenario", choices=SCENARIOS, action="append")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a fork of a process with threads would wait for them for ever
    draw = random.Random(options.seed)
    names = options.scenario or list(SCENARIOS)
    expected = {}
    with tempfile.TemporaryDirectory() as place:
        for name in names:
            finished(name, Path(place, f"{name}-warm"), Path(place, "report"))
            first = finished(name, Path(place, name), Path(place, "report"))
            if " " in first[0]:
                print(f"{name}: fails without being killed: {first[0]}")
                return 1
            expected[name] = first
    wrong: Counter[str] = Counter()
    for number in range(options.trials):
        name = names[number % len(names)]
        kills, problem = trial(name, *expected[name], draw)
        if problem:
            wrong[name] += 1
            print(f"{name}, killed at {', '.join(kills)}: {problem[:300]}", flush=True)
    print(f"{options.trials} trials of {', '.join(names)}: {wrong.total()} did not end as the run that nobody stopped")
    return wrong.total()


if __name__ == "__main__":
    sys.exit(min(main(copy.copy(sys.argv[1:])), 1))

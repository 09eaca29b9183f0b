"""Checkpoints: the full state of a run, saved at any step and taken up again exactly.

A checkpoint is a folder: `state.pt` (tensors and plain values, read with `weights_only=True`), `rng-{rank}.pt` for each
process, and `meta.json`, written last, which makes the folder complete.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from cofiprune.errors import CheckpointError
from cofiprune.training.config import PruneConfig

FORMAT_VERSION = 2
"""1 held the dense model only where it was no longer the one that learns."""
_FOLDER = re.compile(r"checkpoint-(\d+)")
_MAY_CHANGE = {"progress", "logging_steps", "eval_steps", "checkpoint_steps", "latency_cache", "pad_to_multiple_of"}
"""Settings that say nothing about the run, or that come from the machine."""
_COUNTS = ("step", "total_steps", "batches_seen", "seconds", "best")


@dataclass
class Sums:
    """Parts of a loss, added up over some steps or batches."""

    values: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0

    def add(self, parts: Mapping[str, Tensor]) -> None:
        """Add the parts of one more."""
        for name, value in parts.items():
            self.values[name] = self.values[name] + value if name in self.values else value
        self.count += 1

    def take(self) -> dict[str, float]:
        """Return the means, and begin anew."""
        means = {name: float(value) / self.count for name, value in self.values.items()}
        self.values, self.count = {}, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        """Return everything as tensors and plain values."""
        return {"values": self.values, "count": self.count}

    def load_state_dict(self, saved: Mapping[str, Any], device: torch.device) -> None:
        """Take up what `state_dict` returned."""
        self.values = {name: value.to(device) for name, value in saved["values"].items()}
        self.count = saved["count"]


@dataclass
class RunState:
    """The state of a run: the modules and the optimiser that learn in the present phase, and plain counts."""

    phase: str = ""
    modules: dict[str, nn.Module] = field(default_factory=dict)
    """Modules whose tensors a checkpoint holds: the trained model under `model`, and others."""
    optimizer: Optimizer | None = None
    step: int = 0
    """Optimiser steps done in this phase."""
    total_steps: int = 0
    """Optimiser steps done in the run."""
    batches_seen: int = 0
    """Batches taken in the run, over all epochs: the position of the sampler."""
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    sums: Sums = field(default_factory=Sums)
    """Parts of the loss since the last entry of the history."""
    best: dict[str, Any] | None = None
    """The best evaluation so far: `value`, `step` and the model's tensors under `model`."""
    scaler: GradScaler | None = None
    """Of the loss, in float16."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Plain values from which a phase is set up again, such as its plan; they go into `meta.json`."""

    def begin(self, phase: str) -> None:
        """Start a phase; what counts over the run goes on."""
        self.phase, self.step, self.best, self.sums = phase, 0, None, Sums()

    def capture(self) -> dict[str, Any]:
        """Return everything as tensors and plain values."""
        assert self.optimizer is not None
        return {
            "phase": self.phase,
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "history": json.dumps(self.history),
            "sums": self.sums.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            **{name: getattr(self, name) for name in _COUNTS},
        }

    def restore(self, captured: dict[str, Any]) -> None:
        """Take up what `capture` returned; the modules and the optimiser must be set up alike.

        :raises CheckpointError: when they are not; nothing is changed then.
        """
        assert self.optimizer is not None
        self._check(captured)
        for name, module in self.modules.items():
            module.load_state_dict(captured["modules"][name])
        self.optimizer.load_state_dict(captured["optimizer"])
        for name in _COUNTS:
            setattr(self, name, captured[name])
        self.history = json.loads(captured["history"])
        device = next(tensor.device for group in self.optimizer.param_groups for tensor in group["params"])
        self.sums.load_state_dict(captured["sums"], device)
        if self.scaler is not None and captured["scaler"] is not None:
            self.scaler.load_state_dict(captured["scaler"])

    def _check(self, captured: dict[str, Any]) -> None:
        expected = self.capture()
        missing = [name for name in expected if name not in captured]
        if missing:
            raise CheckpointError(f"the checkpoint is damaged: it has no {missing[0]!r}")
        if captured["phase"] != self.phase:
            raise CheckpointError(f"the checkpoint is of phase {captured['phase']!r}, this is {self.phase!r}")
        ours, theirs = list(self.modules), list(captured["modules"])
        if ours != theirs:
            raise CheckpointError(
                f"the checkpoint is of a run with other settings: it holds {', '.join(theirs)}, this run has "
                f"{', '.join(ours)}. Resume with the same arguments, the teacher included"
            )
        for module, tensors in expected["modules"].items():
            shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
            saved = {name: list(tensor.shape) for name, tensor in captured["modules"][module].items()}
            for name in {**shapes, **saved}:
                if shapes.get(name) != saved.get(name):
                    raise CheckpointError(
                        f"the checkpoint is of another model: {name!r} of its {module} is {_shape(saved.get(name))}, "
                        f"here it is {_shape(shapes.get(name))}"
                    )
        sizes = [
            [len(group["params"]) for group in state["param_groups"]]
            for state in (expected["optimizer"], captured["optimizer"])
        ]
        if sizes[0] != sizes[1]:
            raise CheckpointError(
                f"the checkpoint is of a run with other settings: it trains {sum(sizes[1])} parameters, this one "
                f"{sum(sizes[0])}"
            )


def save_checkpoint(
    folder: Path,
    state: RunState,
    fingerprint: dict[str, Any],
    *,
    rank: int = 0,
    keep: int = 2,
    wait: Callable[[], None] = lambda: None,
) -> Path:
    """Write a checkpoint below `folder` and drop all but the newest `keep`.

    :param fingerprint: plain values that a resumed run must have in common with this one.
    :param wait: returns when every process has called it: a checkpoint is complete when all have written their part.
    :return: the checkpoint's own folder.
    """
    target = folder / f"checkpoint-{state.total_steps}"
    target.mkdir(parents=True, exist_ok=True)
    torch.save(_rng_state(), target / f"rng-{rank}.pt")
    wait()
    if rank:
        return target
    write(target / "state.pt", lambda path: torch.save(state.capture(), path))
    meta = {
        "format_version": FORMAT_VERSION,
        "phase": state.phase,
        "step": state.total_steps,
        "extra": state.extra,
        "fingerprint": fingerprint,
    }
    write(target / "meta.json", lambda path: path.write_text(json.dumps(meta), encoding="utf-8"))
    for _, old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint on disk, checked to be complete and readable."""

    folder: Path
    phase: str
    extra: dict[str, Any]
    captured: dict[str, Any]

    def restore_rng(self, rank: int = 0) -> None:
        """Put the random number generators of a process back to where they were.

        :raises CheckpointError: when its part of the checkpoint is missing or damaged.
        """
        try:
            _set_rng_state(torch.load(self.folder / f"rng-{rank}.pt", weights_only=True))
        except Exception as error:  # torch.load raises errors of many kinds
            raise CheckpointError(f"{self.folder} is damaged: its rng-{rank}.pt cannot be read ({error})") from error


def load_checkpoint(folder: Path, fingerprint: dict[str, Any]) -> SavedRun:
    """Read the newest complete checkpoint below `folder`.

    :raises CheckpointError: when there is none, or it is damaged, of another version, or of another run.
    """
    found = _checkpoints(folder)
    if not found:
        started = " (an incomplete one is left of a run that was cut off)" if has_checkpoints(folder) else ""
        raise CheckpointError(f"nothing to resume in {folder}: it has no complete checkpoint-* folder{started}")
    newest = found[-1][1]
    afresh = ", or start afresh with resume=False and another output_dir."
    try:
        meta = json.loads((newest / "meta.json").read_text(encoding="utf-8"))
        check_version(meta["format_version"], newest, afresh)
        phase, extra, saved = str(meta["phase"]), dict(meta["extra"]), dict(meta["fingerprint"])
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{newest} is damaged: its meta.json cannot be read ({error!r})") from error
    check_same(fingerprint, saved, f"{newest} is of another run", afresh)
    try:
        captured = torch.load(newest / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{newest} is damaged: its state.pt cannot be read ({error})") from error
    if not isinstance(captured, dict):
        raise CheckpointError(f"{newest} is damaged: its state.pt holds a {type(captured).__name__}")
    return SavedRun(newest, phase, extra, captured)


def has_checkpoints(folder: Path) -> bool:
    """Return whether a folder holds checkpoints of some run, complete or not."""
    return folder.is_dir() and any(_FOLDER.fullmatch(path.name) for path in folder.iterdir())


def identifying(config: PruneConfig) -> dict[str, Any]:
    """Return the settings that a resumed run must have in common with the one that was saved, as plain values."""
    kept = config.model_dump(exclude=_MAY_CHANGE)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}


def check_version(found: Any, where: Path, otherwise: str) -> None:
    """Make sure that this version reads a format.

    :param otherwise: what else can be done, for the message.
    :raises CheckpointError: for an older or a newer one.
    """
    version = int(found)
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where} was written in format {version} by a newer cofiprune; this version reads format {FORMAT_VERSION}"
        )
    if version < FORMAT_VERSION:
        raise CheckpointError(
            f"{where} was written in format {version} by an older cofiprune; this version reads format "
            f"{FORMAT_VERSION}. Finish that run with the version that began it{otherwise}"
        )


def check_same(asked: Mapping[str, Any], saved: Mapping[str, Any], problem: str, otherwise: str) -> None:
    """Make sure that a checkpoint is of the run that is to go on.

    :param asked: the fingerprint of that run, `saved` the one of the checkpoint.
    :param problem: the beginning of the message where they differ.
    :raises CheckpointError: naming the first value that differs, down to single settings.
    """
    difference = _first_difference(asked, saved)
    if difference is not None:
        name, wanted, was = difference
        raise CheckpointError(
            f"{problem}: its {name} is {was!r}, asked for {wanted!r}. Resume with the same arguments{otherwise}"
        )


def _first_difference(asked: Mapping[str, Any], saved: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    for name, value in asked.items():
        other = saved.get(name)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            inner = _first_difference({**dict.fromkeys(other), **value}, other)
            if inner is not None:
                return inner
        elif value != other:
            return name, value, other
    return None


def write(path: Path, content: Callable[[Path], Any]) -> None:
    """Write a file so that it is either complete or not there."""
    partial = path.with_name(f"{path.name}.partial")
    content(partial)
    os.replace(partial, path)


def _shape(shape: list[int] | None) -> str:
    return "not there" if shape is None else f"of shape {shape}"


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints below a folder, oldest first."""
    if not folder.is_dir():
        return []
    named = ((_FOLDER.fullmatch(path.name), path) for path in folder.iterdir() if (path / "meta.json").exists())
    return sorted((int(match.group(1)), path) for match, path in named if match is not None)


def _rng_state() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
    }


def _set_rng_state(saved: dict[str, Any]) -> None:
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(saved["cuda"])
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = saved["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))

"""Checkpoints on disk: how the state of a run is written, found, read, and told from that of another run.

A state is a folder of two files: `state.pt` (tensors and plain values, read with `weights_only=True`) and `meta.json`,
written last, which makes the folder complete. `write_state` and `read_state` are the only ones that know them. In the
checkpoint of a run, `rng-{rank}.pt` of each process lies next to them.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cofiprune.errors import CheckpointError
from cofiprune.structure import Structure
from cofiprune.training.config import PruneConfig
from cofiprune.training.state import RunState

FORMAT_VERSION = 3
"""2 held the state of Python's and numpy's generators in another form, 1 the dense model only where it was no longer
the one that learns."""
_KEPT = 2
_STATE, _META = "state.pt", "meta.json"
_FOLDER = re.compile(r"checkpoint-(\d+)")
_MAY_CHANGE = {"progress", "logging_steps", "eval_steps", "checkpoint_steps", "latency_cache", "pad_to_multiple_of"}
"""Settings that say nothing about the run, or that come from the machine."""


def write_state(folder: Path, state: RunState, fingerprint: dict[str, Any]) -> None:
    """Write a state into a folder, which is made; it is either complete there or not there.

    :param fingerprint: plain values that a resumed run must have in common with this one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    meta = {
        "format_version": FORMAT_VERSION,
        "phase": state.phase,
        "step": state.total_steps,
        "extra": state.extra,
        "fingerprint": fingerprint,
    }
    _write(folder / _STATE, lambda path: torch.save(state.capture(), path))
    _write(folder / _META, lambda path: path.write_text(json.dumps(meta), encoding="utf-8"))


def _write(path: Path, content: Callable[[Path], Any]) -> None:
    """Write a file so that it is either complete or not there."""
    partial = path.with_name(f"{path.name}.partial")
    content(partial)
    os.replace(partial, path)


@dataclass(frozen=True)
class SavedRun:
    """A state on disk, checked to be complete, readable and of the right run."""

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


def has_state(folder: Path) -> bool:
    """Return whether a folder holds a state that was written to its end."""
    return (folder / _META).exists()


def read_state(folder: Path, fingerprint: dict[str, Any], otherwise: str) -> SavedRun:
    """Read what `write_state` wrote.

    :param otherwise: what else can be done, for the end of messages: ", or ...".
    :raises CheckpointError: when it is damaged, of another version, or of another run.
    """
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        version = int(meta["format_version"])
        if version == FORMAT_VERSION:
            phase, extra, saved = str(meta["phase"]), dict(meta["extra"]), dict(meta["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is damaged: its {_META} cannot be read ({error!r})") from error
    if version != FORMAT_VERSION:
        age = "a newer" if version > FORMAT_VERSION else "an older"
        advice = "" if version > FORMAT_VERSION else f". Finish that run with the version that began it{otherwise}"
        raise CheckpointError(
            f"{folder} was written in format {version} by {age} cofiprune; this version reads format "
            f"{FORMAT_VERSION}{advice}"
        )
    check_same(fingerprint, saved, f"{folder} is of another run", otherwise)
    try:
        captured = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{folder} is damaged: its {_STATE} cannot be read ({error})") from error
    if not isinstance(captured, dict):
        raise CheckpointError(f"{folder} is damaged: its {_STATE} holds a {type(captured).__name__}")
    return SavedRun(folder, phase, extra, captured)


def save_checkpoint(
    folder: Path,
    state: RunState,
    fingerprint: dict[str, Any],
    *,
    rank: int = 0,
    wait: Callable[[], None] = lambda: None,
) -> Path:
    """Write a checkpoint below `folder` and drop all but the two newest.

    :param fingerprint: plain values that a resumed run must have in common with this one.
    :param wait: returns when every process has called it: a checkpoint is complete when all have written their part.
    :return: the checkpoint's own folder.
    """
    target = folder / f"checkpoint-{state.total_steps}"
    target.mkdir(parents=True, exist_ok=True)
    torch.save(_rng_state(), target / f"rng-{rank}.pt")
    wait()
    if not rank:
        write_state(target, state, fingerprint)
        for _, old in _checkpoints(folder)[:-_KEPT]:
            shutil.rmtree(old)
    wait()  # whoever ends now does not take the others with it while they write
    return target


def load_checkpoint(folder: Path, fingerprint: dict[str, Any]) -> SavedRun:
    """Read the newest complete checkpoint below `folder`.

    :raises CheckpointError: when there is none, or it is damaged, of another version, or of another run.
    """
    found = _checkpoints(folder)
    if not found:
        started = " (an incomplete one is left of a run that was cut off)" if has_checkpoints(folder) else ""
        raise CheckpointError(f"nothing to resume in {folder}: it has no complete checkpoint-* folder{started}")
    return read_state(found[-1][1], fingerprint, ", or start afresh with resume=False and another output_dir.")


def has_checkpoints(folder: Path) -> bool:
    """Return whether a folder holds checkpoints of some run, complete or not."""
    return folder.is_dir() and any(_FOLDER.fullmatch(path.name) for path in folder.iterdir())


def identifying(config: PruneConfig) -> dict[str, Any]:
    """Return the settings that a resumed run must have in common with the one that was saved, as plain values."""
    return config.model_dump(mode="json", exclude=_MAY_CHANGE)


def identity(structure: Structure, teacher: Any, config: PruneConfig) -> dict[str, Any]:
    """Return what any resumed run must have in common with the one that was saved, as plain values.

    :param teacher: a model, "self" or None.
    """
    return {
        "family": structure.family,
        "sizes": sum(structure.sizes.values()),
        "teacher": teacher if teacher is None or isinstance(teacher, str) else type(teacher).__name__,
        "config": identifying(config),
    }


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


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints below a folder, oldest first."""
    if not folder.is_dir():
        return []
    named = ((_FOLDER.fullmatch(path.name), path) for path in folder.iterdir() if has_state(path))
    return sorted((int(match.group(1)), path) for match, path in named if match is not None)


def _rng_state() -> dict[str, Any]:
    kind, keys, *others = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (str(kind), np.asarray(keys).tolist(), *others),
    }


def _set_rng_state(saved: dict[str, Any]) -> None:
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(saved["cuda"])
    random.setstate(saved["python"])
    np.random.set_state(saved["numpy"])

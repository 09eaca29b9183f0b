"""Checkpoints on disk: how the state of a run is written, found, read, and told from that of another run.

A state is a folder of two files: `state.pt` (tensors and plain values, read with `weights_only=True`) and `meta.json`,
with the checksums of the others, written last, which makes the folder complete. `write_state` and `read_state` are the
only ones that know them. In the checkpoint of a run, `rng-{rank}.pt` of each process lies next to them.
"""

from __future__ import annotations

import random
import re
import shutil
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from cofiprune.errors import CheckpointError, StorageError, explained
from cofiprune.files import check_sums, checksum, read_json, read_sealed, unsealed, write, write_sealed
from cofiprune.training.identity import check_same
from cofiprune.training.processes import together
from cofiprune.training.state import RunState

FORMAT_VERSION = 4
"""3 had no checksums; 2 held the state of Python's and numpy's generators in another form; 1 held the dense model only
where it was no longer the one that learns."""
Resume = bool | Literal["auto"]
"""Whether a run goes on from a checkpoint: "auto" where there is one."""
_KEPT = 2
_STATE, _META, _STOPPED = "state.pt", "meta.json", "stopped.json"
_FOLDER = re.compile(r"checkpoint-(\d+)")
_OTHERWISE = ", or start afresh with resume=False and another output_dir."


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
    (folder / _META).unlink(missing_ok=True)
    write(folder / _STATE, lambda path: torch.save(state.capture(), path))
    sums = {file.name: checksum(file) for file in sorted(folder.glob("*.pt"))}
    write_sealed(folder / _META, {**meta, "checksums": sums})


@dataclass(frozen=True)
class SavedRun:
    """A state on disk, checked to be complete, readable and of the right run."""

    folder: Path
    phase: str
    extra: dict[str, Any]
    captured: dict[str, Any]
    fingerprint: dict[str, Any]

    def restore_rng(self, rank: int = 0) -> None:
        """Put the random number generators of a process back to where they were.

        :raises CheckpointError: when its part of the checkpoint is missing.
        """
        with explained(CheckpointError, f"{self.folder} is damaged: its rng-{rank}.pt cannot be read", Exception):
            _set_rng_state(torch.load(self.folder / f"rng-{rank}.pt", weights_only=True))


def has_state(folder: Path) -> bool:
    """Return whether a folder holds a state that was written to its end."""
    return (folder / _META).exists()


class DamagedError(CheckpointError):
    """A checkpoint that is not as it was written."""


def read_state(folder: Path, fingerprint: dict[str, Any], otherwise: str) -> SavedRun:
    """Read what `write_state` wrote.

    :param otherwise: what else can be done, for the end of messages: ", or ...".
    :raises DamagedError: when a file is not as it was written.
    :raises CheckpointError: when it is of another version, or of another run.
    """
    problem = f"{folder} is damaged"
    found = read_json(folder / _META, DamagedError, f"{problem}: {_META} cannot be read")
    stated = found.get("format_version")
    if isinstance(stated, int) and stated != FORMAT_VERSION:
        age = "a newer" if stated > FORMAT_VERSION else "an older"
        advice = "" if stated > FORMAT_VERSION else f". Finish that run with the version that began it{otherwise}"
        raise CheckpointError(
            f"{folder} was written in format {stated} by {age} cofiprune; this version reads format "
            f"{FORMAT_VERSION}{advice}"
        )
    meta = unsealed(found, DamagedError, f"{problem}: {_META}")
    check_same(fingerprint, meta["fingerprint"], f"{folder} is of another run", otherwise)
    check_sums(folder, meta["checksums"], DamagedError, problem)
    with explained(DamagedError, f"{problem}: its {_STATE} cannot be read", Exception):
        captured = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
    return SavedRun(folder, meta["phase"], meta["extra"], captured, meta["fingerprint"])


def save_checkpoint(
    folder: Path,
    state: RunState,
    fingerprint: dict[str, Any],
    *,
    rank: int = 0,
) -> Path:
    """Write a checkpoint below `folder` and drop all but the two newest. Every process of a run writes its part.

    :param fingerprint: plain values that a resumed run must have in common with this one.
    :return: the checkpoint's own folder.
    """
    target = folder / f"checkpoint-{state.total_steps}"
    with together():
        target.mkdir(parents=True, exist_ok=True)
        write(target / f"rng-{rank}.pt", lambda path: torch.save(_rng_state(), path))
    with together():  # whoever ends after it does not take the others with it while they write
        if not rank:
            write_state(target, state, fingerprint)
        for _, old in [] if rank else _checkpoints(folder)[:-_KEPT]:
            (old / _META).unlink()  # first, so that what is left of a folder does not count as whole
            old.unlink() if old.is_symlink() else shutil.rmtree(old)
    return target


def load_checkpoint(folder: Path, fingerprint: dict[str, Any]) -> SavedRun:
    """Read the newest checkpoint below `folder` that is whole; of damaged ones it warns.

    :raises CheckpointError: when there is none, or it is of another version or of another run.
    """
    damaged: list[DamagedError] = []
    for _, newest in reversed(_checkpoints(folder)):
        try:
            saved = read_state(newest, fingerprint, _OTHERWISE)
        except DamagedError as error:
            damaged.append(error)
            continue
        for problem in damaged:
            warnings.warn(f"{problem}; the run goes on from {newest.name}", UserWarning, stacklevel=2)
        return saved
    if damaged:
        raise damaged[0]
    raise CheckpointError(
        f"nothing to resume in {folder}: it has no complete checkpoint-* folder. resume='auto' starts afresh then"
    )


def note_stop(folder: Path, model: str, left: str) -> None:
    """Note a digest of the model that a stopped run has left beside that of the model which it began with.

    Whoever goes on may hand in either.
    """
    with suppress(StorageError):
        write_sealed(folder / _STOPPED, {"model": model, "left": left})


def begun_with(folder: Path, model: str) -> str:
    """Return the digest of the model that a run began with, by that of a model that is handed in to go on.

    :raises CheckpointError: when what `note_stop` wrote cannot be read.
    """
    file = folder / _STOPPED
    if not file.exists():
        return model
    noted = read_sealed(file, CheckpointError, f"{file} is damaged; delete it")
    return str(noted["model"]) if noted["left"] == model else model


def has_checkpoints(folder: Path) -> bool:
    """Return whether a folder holds complete checkpoints of some run."""
    return bool(_checkpoints(folder))


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a run whose model is written, and what it noted for going on."""
    for _, place in _checkpoints(folder):
        (place / _META).unlink()  # first, so that what is left of a folder does not count as whole
        place.unlink() if place.is_symlink() else shutil.rmtree(place)
    for name in (_STOPPED, "choice.json"):
        (folder / name).unlink(missing_ok=True)


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

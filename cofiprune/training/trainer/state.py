"""What a pruning callback adds to a checkpoint of the Trainer: one file, read with `weights_only=True`."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cofiprune.errors import CheckpointError
from cofiprune.training.state import first_difference

FILE = "cofiprune.pt"
FORMAT_VERSION = 1


def save(folder: Path, captured: dict[str, Any], fingerprint: dict[str, Any], model: nn.Module) -> None:
    """Write the file into a checkpoint's folder.

    :param captured: tensors and plain values.
    :param fingerprint: plain values that a resumed run must have in common with this one.
    """
    payload = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "weights": digest(model),
        "captured": captured,
    }
    partial = folder / f"{FILE}.partial"
    torch.save(payload, partial)
    os.replace(partial, folder / FILE)


def load(args: Any, step: int, fingerprint: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Read what was captured with the weights that a model holds now.

    :param args: the Trainer's arguments; they say where its checkpoints are.
    :param step: where the Trainer resumes.
    :raises CheckpointError: when it is not there, damaged, newer than this version, or of another run.
    """
    folders = [Path(args.output_dir) / f"checkpoint-{step}"]
    if args.resume_from_checkpoint and Path(str(args.resume_from_checkpoint)).is_dir():
        folders.insert(0, Path(str(args.resume_from_checkpoint)))
    path = next((folder / FILE for folder in folders if (folder / FILE).is_file()), None)
    if path is None:
        raise CheckpointError(
            f"the Trainer resumes at step {step}, and the gates of that step are missing: there is no "
            f"{folders[0] / FILE}. Resume from a checkpoint that a run with PruningCallback wrote; one outside of "
            "output_dir is found when TrainingArguments(resume_from_checkpoint=...) names it too"
        )
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
        version, saved, weights = int(payload["format_version"]), payload["fingerprint"], payload["weights"]
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: it cannot be read ({error!r})") from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} was written in format {version} by a newer cofiprune; this version reads formats up to "
            f"{FORMAT_VERSION}"
        )
    difference = first_difference(fingerprint, saved)
    if difference is not None:
        name, asked, was = difference
        raise CheckpointError(
            f"{path} is of another run: its {name} is {was!r}, asked for {asked!r}. Resume with the same arguments"
        )
    if weights != digest(model):
        raise CheckpointError(
            f"{path} is of another run: its gates were saved with other weights than those the Trainer resumes from"
        )
    captured: dict[str, Any] = payload["captured"]
    return captured


def digest(model: nn.Module) -> str:
    """A hash of a model's biases and norms, which are few and change with every step."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.dim() <= 1:
            found.update(name.encode())
            found.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()

"""The identity of a run: what a resumed one must have in common with the one that was saved.

Models and rows are told apart by digests of their content: the weights and the configuration of a model, the rows of a
data set in their order. So a checkpoint is never taken up by another student, another teacher or other data, however
alike their shapes are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from cofiprune.data.batches import Batches, RowBatches
from cofiprune.data.streams import StreamBatches
from cofiprune.errors import CheckpointError
from cofiprune.hooks import same_random_state
from cofiprune.training.config import PruneConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MAY_CHANGE = {"progress", "logging_steps", "eval_steps", "checkpoint_steps", "latency_cache", "pad_to_multiple_of"}
"""Settings that say nothing about the run, or that come from the machine."""
_ROWS_READ = 512
"""Rows looked at, evenly spaced, of a data set that makes them when they are asked for; all of one in memory."""
_DIGEST = "sha256:"
_SAYS_NOTHING = ("_name_or_path", "transformers_version", "_attn_implementation", "architectures", "dtype", "auto_map")
"""Settings of a configuration that do not say what a model computes, or that its class or its tensors say too."""


def identifying(config: PruneConfig) -> dict[str, Any]:
    """Return the settings that a resumed run must have in common with the one that was saved, as plain values."""
    return config.model_dump(mode="json", exclude=_MAY_CHANGE)


def identity(model: PreTrainedModel, teacher: Any, config: PruneConfig, *, with_weights: bool = True) -> dict[str, Any]:
    """Return what any resumed run must have in common with the one that was saved, as plain values.

    :param model: as it is before anything of it is changed.
    :param teacher: a model, "self" or None.
    :param with_weights: False where the model holds other weights each time that the run goes on.
    """
    return {
        "config": identifying(config),
        "model": digest_of_model(model) if with_weights else _digest_of_settings(model),
        "teacher": teacher if teacher is None or isinstance(teacher, str) else digest_of_model(teacher),
        "versions": {name: version(name) for name in ("cofiprune", "torch", "transformers")},
    }


def digest_of_model(model: PreTrainedModel) -> str:
    """Return a digest of a model's class, its configuration and all of its tensors, with their types."""
    return _DIGEST + _digest([_digest_of_settings(model), digest_of_weights(model)])


def digest_of_weights(model: nn.Module) -> str:
    """Return a digest of all of a model's tensors, with their names and types."""
    return _DIGEST + _digest(model.state_dict())


def _digest_of_settings(model: PreTrainedModel) -> str:
    settings = {name: value for name, value in model.config.to_dict().items() if name not in _SAYS_NOTHING}
    if settings.get("problem_type") != "regression" or model.config.num_labels == 1:
        # Read off the labels and written by transformers itself, when a loss is computed for the first time.
        settings.pop("problem_type", None)
    return _DIGEST + _digest([type(model).__name__, json.dumps(settings, sort_keys=True, default=str)])


def digest_of_rows(batches: Batches) -> str:
    """Return a digest of the rows of a data set in their order, of the first ones of a stream; of a DataLoader's, where
    it reads a data set."""
    if isinstance(batches, RowBatches):
        rows: Any = batches.rows
        every = batches.in_memory
    elif isinstance(batches, StreamBatches):
        rows, every = batches.head, True
    else:
        rows, every = getattr(getattr(batches, "loader", None), "dataset", None), False
    return digest_of_data(rows, every=every) or f"{batches.total} batches"


def digest_of_data(rows: Any, *, every: bool = False) -> str:
    """Return a digest of a data set's rows in their order; "" for one whose rows cannot be asked for.

    :param every: look at all rows, not at some only.
    """
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        return ""
    number = len(rows)
    found = hashlib.sha256(str(number).encode())
    places = range(number) if every else np.unique(np.linspace(0, number - 1, _ROWS_READ).astype(int)).tolist()
    with same_random_state():
        if not every and _digest(rows[0]) != _digest(rows[0]):
            return f"{number} rows that are another each time"
        for place in places:
            _add(found, rows[place])
    return _DIGEST + found.hexdigest()


def check_same(asked: Mapping[str, Any], saved: Mapping[str, Any], problem: str, otherwise: str) -> None:
    """Make sure that a checkpoint is of the run that is to go on.

    :param asked: the identity of that run, `saved` the one of the checkpoint.
    :param problem: the beginning of the message where they differ.
    :raises CheckpointError: naming the first value that differs, down to single settings.
    """
    difference = _first_difference(asked, saved)
    if difference is not None:
        name, wanted, was = difference
        told = f"its {name} is {was!r}, asked for {wanted!r}"
        if any(isinstance(value, str) and value.startswith(_DIGEST) for value in (wanted, was)):
            told = f"it had another {name}, told by the content"
            if name == "model":
                told += "; where a head is new, transformers.set_seed before it is made gives the same one again"
        raise CheckpointError(f"{problem}: {told}. Resume with the same arguments{otherwise}")


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


def _digest(value: Any) -> str:
    found = hashlib.sha256()
    _add(found, value)
    return found.hexdigest()


def _add(found: Any, value: Any) -> None:
    """Add a value to a digest: tensors, arrays, plain values, and what holds them; of others their class alone."""
    if isinstance(value, Tensor):
        found.update(f"{value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    elif hasattr(value, "__array_interface__"):  # arrays and images
        array = np.asarray(value)
        found.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    elif isinstance(value, Mapping):
        _add(found, list(value.items()))
    elif isinstance(value, list | tuple):
        found.update(f"{len(value)} items".encode())
        for item in value:
            _add(found, item)
    else:
        plain = value is None or isinstance(value, str | bytes | int | float)
        found.update((repr(value) if plain else type(value).__name__).encode())

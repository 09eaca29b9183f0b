"""What stands beside the files of an export: a configuration of the exported sizes, and the tokenizer."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import nn

from cofiprune import files
from cofiprune.errors import SettingsError
from cofiprune.record import recorded_sizes
from cofiprune.whole import Whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NO_LIMIT = 1_000_000
"""Tokenizers without a limit say a number above this."""
_OF_WEIGHTS = ("*.safetensors*", "*.bin*", "*.py", "plan.json")
"""What an object of sentence-transformers saves of its model; files in its folders are those of its modules."""
_LAST = (".onnx", ".xml")
"""Endings of files that name others, and are written after them."""
_FILES = (
    "onnx/model.onnx",
    "onnx/model_quantized.onnx",
    "openvino/openvino_model.xml",
    "openvino/openvino_model_qint8_quantized.xml",
)
"""All that an export may write of weights."""


def exported_config(model: PreTrainedModel) -> dict[str, Any]:
    """Return a configuration for what reads exported files: how wide their outputs are, and nothing of loading weights.

    There are none beside it, so it does not record how a compacted model differs from the dense one.
    """
    config = copy.deepcopy(model.config)
    width = (recorded_sizes(config) or {}).get("hidden")
    entries: dict[str, Any] = json.loads(config.to_json_string())
    if width is not None:
        entries[config.attribute_map.get("hidden_size", "hidden_size")] = width
    for name in ("quantization_config", "auto_map"):
        entries.pop(name, None)
    return {**entries, "dtype": "float32"}


def holds_weights(folder: Path, model: PreTrainedModel) -> bool:
    """Return whether a model was saved in a folder, which then has a configuration that it cannot do without.

    :raises SettingsError: when it is another one.
    """
    if not any(file for pattern in _OF_WEIGHTS[:2] for file in folder.glob(pattern)):
        return False
    entries = files.read_json(folder / "config.json", SettingsError, f"{folder} holds weights, but no configuration")
    own = json.loads(model.config.to_json_string())
    for name in ("model_type", "vocab_size", "num_hidden_layers", "quantization_config"):
        if entries.get(name) != own.get(name):
            raise SettingsError(
                f"{folder} holds the weights of another model than this {type(model).__name__}: its config.json has "
                f"another {name}. Name another folder"
            )
    return True


def write_beside(folder: Path, whole: Whole, tokenizer: Any, *, saved: bool) -> None:
    """Write configuration and tokenizer, or processor; and the modules of an object of sentence-transformers.

    :param saved: the model is, where these will be; then only the tokenizer is missing.
    """
    if whole.kind is not None and not saved:
        with TemporaryDirectory(dir=folder) as name:
            whole.owner.save_pretrained(name, create_model_card=False)
            left = [file for pattern in _OF_WEIGHTS for file in Path(name).glob(pattern)]
            for file in left:
                file.unlink()
            move(Path(name), folder)
    if not saved:
        files.write_json(folder / "config.json", exported_config(whole.model), indent=2)
    if tokenizer is not None:
        _with_one_limit(tokenizer).save_pretrained(folder)


def _with_one_limit(tokenizer: Any) -> Any:
    """Return a tokenizer that cuts and pads texts alike for everyone who reads its files.

    One may come with two limits, `model_max_length` in its configuration and another one in tokenizer.json, with which
    it was trained or loaded; which of them is taken depends on the reader.
    """
    limit = getattr(tokenizer, "model_max_length", None)
    if not getattr(tokenizer, "is_fast", False) or not limit or limit >= _NO_LIMIT or tokenizer.pad_token is None:
        return tokenizer
    own = copy.deepcopy(tokenizer)
    if "max_length" in own.init_kwargs:
        own.init_kwargs["max_length"] = limit
    own.backend_tokenizer.enable_truncation(limit, direction=own.truncation_side)
    own.backend_tokenizer.enable_padding(
        direction=own.padding_side, pad_id=own.pad_token_id, pad_type_id=own.pad_token_type_id, pad_token=own.pad_token
    )
    return own


def mark_of(whole: nn.Module) -> str:
    """Return a text that stands in the files of a model and in those of no other: a digest of what is exported."""
    found = hashlib.sha256(repr(whole).encode())
    for name, value in (*whole.named_parameters(), *whole.named_buffers()):
        found.update(f"{name} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    return f"cofiprune {found.hexdigest()}"


def remove_others(folder: Path, staged: Path, mark: str) -> tuple[str, ...]:
    """Remove files of earlier exports of other models, which would be taken for forms of the one that comes.

    :param staged: the files that come.
    :param mark: of the model whose files may stay.
    :return: those that are gone.
    """
    gone = []
    for name in _FILES:
        file, comes = folder / name, (staged / name).exists()
        if not file.exists() or (not comes and mark.encode() in file.read_bytes()):
            continue
        weights = file.with_suffix(".bin" if file.suffix == ".xml" else ".onnx.data")
        if not comes or (weights.exists() and not (staged / weights.relative_to(folder)).exists()):
            file.unlink()
            weights.unlink(missing_ok=True)
        gone += [] if comes else [name]
    return tuple(gone)


def move(source: Path, target: Path) -> None:
    """Move the files of a folder into another one, where each then stands whole."""
    found = sorted((file for file in source.rglob("*") if file.is_file()), key=lambda file: file.suffix in _LAST)
    for file in found:
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        files.write(place, partial(shutil.move, file))

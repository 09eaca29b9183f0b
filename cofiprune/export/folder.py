"""What stands beside the files of an export: a configuration of the exported sizes, and the tokenizer."""

from __future__ import annotations

import copy
import json
import shutil
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from cofiprune import files
from cofiprune.record import recorded_sizes
from cofiprune.whole import Whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OF_WEIGHTS = ("*.safetensors*", "*.bin*", "*.py", "plan.json")
"""What an object of sentence-transformers saves of its model; files in its folders are those of its modules."""
_LAST = (".onnx", ".xml")
"""Endings of files that name others, and are written after them."""


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


def write_beside(folder: Path, whole: Whole, tokenizer: Any) -> None:
    """Write configuration and tokenizer, or processor; and the modules of an object of sentence-transformers."""
    if whole.kind is not None:
        with TemporaryDirectory(dir=folder) as name:
            whole.owner.save_pretrained(name, create_model_card=False)
            left = [file for pattern in _OF_WEIGHTS for file in Path(name).glob(pattern)]
            for file in left:
                file.unlink()
            move(Path(name), folder)
    files.write_json(folder / "config.json", exported_config(whole.model), indent=2)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def move(source: Path, target: Path) -> None:
    """Move the files of a folder into another one, where each then stands whole."""
    found = sorted((file for file in source.rglob("*") if file.is_file()), key=lambda file: file.suffix in _LAST)
    for file in found:
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        files.write(place, partial(shutil.move, file))

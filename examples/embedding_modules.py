"""The files that make a folder a sentence-transformers one: read for the way of pooling, and copied with the model."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cofiprune.errors import CheckpointError

MODULES, POOLING_CONFIG = "modules.json", "config.json"
SETTINGS = ("config_sentence_transformers.json", "sentence_bert_config.json")
_WIDTHS = ("word_embedding_dimension", "embedding_dimension")
"""Names that the pooling's width has gone by."""
_OF_ANY_WIDTH = ("Transformer", "Pooling", "Normalize")
"""Modules that do not mind a width other than the one that they were saved with."""


@dataclass(frozen=True)
class Modules:
    """What a sentence-transformers folder says besides the encoder; an empty one where it is no such folder."""

    folder: Path | None
    entries: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(cls, source: str) -> "Modules":
        """Read the modules of a folder.

        :raises CheckpointError: when its files cannot be read.
        """
        folder = Path(source).expanduser()
        if not (folder / MODULES).is_file():
            return cls(None)
        entries = _json(folder / MODULES)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) and "type" in entry for entry in entries):
            raise CheckpointError(f"{folder / MODULES} is no list of modules")
        for entry in entries:
            if not (folder / str(entry.get("path") or "")).resolve().is_relative_to(folder.resolve()):
                raise CheckpointError(f"{folder / MODULES} names {entry['path']!r}, which is outside of its folder")
        return cls(folder, tuple(entries))

    @property
    def pooling(self) -> str | None:
        """mean or cls; None where no module says it, another word for another way."""
        for entry in self.entries:
            if _kind(entry) == "Pooling" and self.folder is not None:
                settings = _json(self.folder / entry["path"] / POOLING_CONFIG)
                stated = settings.get("pooling_mode")
                old = [name.removeprefix("pooling_mode_") for name, on in settings.items() if on is True]
                words = [stated] if isinstance(stated, str) else [name for name in old if name != "include_prompt"]
                short = {"mean_tokens": "mean", "cls_token": "cls"}
                return "+".join(short.get(word, word) for word in words) or "mean"
        return None

    @property
    def fixed(self) -> list[str]:
        """Modules that need vectors of the width that they were saved for."""
        return [_kind(entry) for entry in self.entries if _kind(entry) not in _OF_ANY_WIDTH]

    def copy(self, target: Path, width: int) -> list[str]:
        """Copy the files, and return their names.

        :param width: dimensions of the vectors, which the pooling module is told.
        """
        if self.folder is None:
            return []
        copied = []
        for name in (MODULES, *SETTINGS):
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, target / name)
                copied.append(name)
        for entry in self.entries:
            path = str(entry.get("path") or "")
            if not path or not (self.folder / path).is_dir():  # the encoder itself, or a module without settings
                continue
            shutil.copytree(self.folder / path, target / path, dirs_exist_ok=True)
            copied.append(path)
            if _kind(entry) == "Pooling":
                _set_width(target / path / POOLING_CONFIG, width)
        return copied


def _set_width(file: Path, width: int) -> None:
    settings = _json(file)
    settings.update({name: width for name in _WIDTHS if name in settings})
    file.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _kind(entry: dict[str, Any]) -> str:
    return str(entry["type"]).rpartition(".")[2]


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file}: {' '.join(str(error).split())}") from error

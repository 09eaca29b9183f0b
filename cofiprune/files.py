"""Files that are read back: written whole or not at all, and validated as they are read.

A write goes to a file beside, which is flushed to the disk and then takes the name: whoever stops the process, the name
stands for the old content or for the new one. A read checks every value against the types of a dataclass, strictly: a
number in quotes is no number, and an entry that nobody knows is an error.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from cofiprune.errors import CofipruneError, SettingsError, StorageError, explained, one_line

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

STRICT = {"extra": "forbid"}
_SEAL = "checksum"
_FINISHED = ("model.safetensors", "model.safetensors.index.json", "result.json")


def write(path: Path, content: Callable[[Path], Any]) -> None:
    """Write a file so that it is complete or not there, also after a power cut.

    :param content: writes it to the path that it gets.
    :raises StorageError: when that fails; what the name stood for is still there then.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        content(partial)
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)
    except (OSError, RuntimeError) as error:  # torch raises the latter on a full disk
        with suppress(OSError):
            partial.unlink()
        raise StorageError(f"{path} cannot be written: {one_line(error)}") from error


def check_unfinished(folder: Path) -> None:
    """Make sure that a folder holds no finished model, which may be the work of hours.

    :raises SettingsError: when it does.
    """
    found = next((name for name in _FINISHED if (folder / name).exists()), None)
    if found is not None:
        raise SettingsError(f"{folder} holds a finished model ({found}): choose another folder, or pass overwrite=True")


def write_json(path: Path, value: Any, *, indent: int | None = None) -> None:
    """Write plain values as JSON, by `write`."""
    text = json.dumps(value, indent=indent)
    write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def read_json(path: Path, error: type[CofipruneError], problem: str) -> dict[str, Any]:
    """Read a JSON object.

    :raises error: when the file cannot be read or holds something else.
    """
    with explained(error, problem, OSError, ValueError, RecursionError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__} instead of an object")
    return cast("dict[str, Any]", found)


def write_sealed(path: Path, entries: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Write plain values with a checksum of them, by `write`; for files that nobody is to edit."""
    write_json(path, {**entries, _SEAL: digest(entries)}, indent=indent)


def read_sealed(path: Path, error: type[CofipruneError], problem: str) -> dict[str, Any]:
    """Read what `write_sealed` wrote.

    :raises error: when the file cannot be read, or says anything else than what was written.
    """
    return unsealed(read_json(path, error, problem), error, problem)


def unsealed(entries: Mapping[str, Any], error: type[CofipruneError], problem: str) -> dict[str, Any]:
    """Return the content of a sealed file without its checksum.

    :raises error: when it is not what was written.
    """
    content = {name: value for name, value in entries.items() if name != _SEAL}
    if entries.get(_SEAL) != digest(content):
        raise error(f"{problem}: its checksum is not that of its content")
    return content


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sums(folder: Path, sums: Mapping[str, str], error: type[CofipruneError], problem: str) -> None:
    """Compare files with checksums that were taken of them.

    :param sums: by name in the folder.
    :raises error: naming the first file that is missing or another.
    """
    for name, expected in sums.items():
        with explained(error, f"{problem}: {name} cannot be read", OSError):
            found = checksum(folder / name)
        if found != expected:
            raise error(f"{problem}: {name} is not as it was written")


def digest(entries: Any) -> str:
    """Return the SHA-256 of plain values, whatever the order of their names."""
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def validated(cls: type[T], entries: Mapping[str, Any], error: type[CofipruneError], problem: str) -> T:
    """Make a dataclass of plain values, every one of which has the type that the class states.

    :param cls: with `__pydantic_config__ = STRICT`, so that it takes no entries that it does not know.
    :raises error: naming the first value that has not.
    """
    from pydantic import ValidationError  # imported late: it takes a while, and most of the package does without

    try:
        return cast("T", _adapter(cast("type", cls)).validate_json(json.dumps(entries), strict=True))
    except ValidationError as found:
        first = found.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "its content"
        raise error(f"{problem}: {place}: {first['msg']}") from None
    except (TypeError, ValueError, RecursionError) as found:
        raise error(f"{problem}: {found}") from None


def check_format(version: Any, newest: int, error: type[CofipruneError], what: str) -> None:
    """Make sure that a file's format is one that this version reads.

    :raises error: when it states none, or a newer one.
    """
    if type(version) is not int or version < 1:
        raise error(f"{what}: it states no format_version")
    if version > newest:
        raise error(f"{what}: it is in format {version}, this version of cofiprune reads formats up to {newest}")


@functools.cache
def _adapter(cls: type) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def _flush(path: Path) -> None:
    """Have a file's or a folder's content on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows does not open folders
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)

"""Options: a parser whose complaints are one line, and the fields of the settings models as options."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from cofiprune.errors import CofipruneError, suggest
from cofiprune.training.config import PruneConfig
from cofiprune.training.settings import Settings, TrainingSettings

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo


class UsageError(CofipruneError, ValueError):
    """A command line that cannot be understood."""


class Parser(argparse.ArgumentParser):
    """Takes `--batch_size` for `--batch-size`, and no abbreviations: they would hide slips."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse arguments, options in either spelling.

        :raises UsageError: when they cannot be understood.
        """
        end = list(arguments).index("--") if "--" in arguments else len(arguments)
        return self.parse_args([*map(self._dashed, arguments[:end]), *arguments[end:]])

    def _dashed(self, argument: str) -> str:
        """Spell an option as it was declared; complaining here, unknown ones come before what is missing."""
        if not argument.startswith("--"):
            return argument
        name, equals, value = argument.partition("=")
        name = name.replace("_", "-")
        known = [option for option in self._option_string_actions if option.startswith("--")]
        if name not in known:
            near = suggest(name, known) or f" {self.prog} --help lists the options"
            raise UsageError(f"unknown option {name}.{near}")
        return f"{name}{equals}{value}"

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print and exit for."""
        raise UsageError(message)


def one_of(choices: Iterable[str], noun: str) -> Callable[[str], str]:
    """Make the type of an argument that takes one of some words, and suggests the nearest for any other."""
    known = tuple(choices)

    def chosen(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(
                f"unknown {noun} {text!r}.{suggest(text, known)} One of {', '.join(known)}"
            )
        return text

    return chosen


def at_least(smallest: int) -> Callable[[str], int]:
    """Make the type of an argument that is a whole number no smaller than `smallest`."""

    def whole(text: str) -> int:
        value = int(text)
        if value < smallest:
            raise argparse.ArgumentTypeError(f"{text} is less than {smallest}")
        return value

    whole.__name__ = "whole number"  # argparse names it when the text is not one
    return whole


def number(text: str) -> float:
    """The type of an argument that is a number."""
    return float(text)


def numbers(text: str) -> list[float]:
    """The type of an argument that is one or several numbers, joined by commas."""
    return [float(part) for part in text.split(",")]


numbers.__name__ = "number"  # argparse names it when the text is none


def writable_directory(text: str, *, other_than: Sequence[str | None] = ()) -> Path:
    """Check that a directory can be written to, or made, before anything is computed; nothing is made yet.

    :param other_than: directories that are read from, which writing would overwrite.
    :raises UsageError: when it cannot be one, or is one of those.
    """
    path = Path(text).expanduser()
    for source in other_than:
        if source is not None and Path(source).exists() and Path(source).resolve() == path.resolve():
            raise UsageError(f"{path} is read from and would be overwritten; choose another directory to write to")
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise UsageError(f"cannot write to {path}: {existing} is a file")
    if not os.access(existing, os.W_OK):
        raise UsageError(f"cannot write to {path}: no permission to write to {existing}")
    return path


def add_settings(parser: argparse.ArgumentParser, *models: type[Settings], hidden: Container[str] = ()) -> None:
    """Add an option for every field of some settings models: names, kinds, defaults and help are read off the models.

    :param hidden: options that are taken and not shown in the help.
    """
    for model in models:
        kind = model.__name__.removesuffix("Settings").lower()
        group = parser.add_argument_group(f"{kind} settings", f"{model.__doc__} None is spelled none.")
        for name, field in model.model_fields.items():
            if name not in Settings.model_fields or issubclass(model, TrainingSettings):  # what all have stands there
                _add(group, name, field, hidden=name in hidden)


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the command line gives, by name."""
    given = vars(options)
    return {name: _read(given[name], field) for name, field in PruneConfig.model_fields.items() if name in given}


def _add(group: argparse._ArgumentGroup, name: str, field: FieldInfo, *, hidden: bool) -> None:
    text = f"{' '.join((field.description or '').split())} (default: {_shown(field.default)})".replace("%", "%%")
    settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS if hidden else text}
    kind = next(kind for kind in _kinds(field.annotation) if kind is not NoneType)
    parts = get_args(kind)
    if kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    elif get_origin(kind) is Literal:
        settings["metavar"] = "{" + ",".join(map(str, parts)) + "}"
    elif get_origin(kind) is tuple and parts[-1] is Ellipsis:
        settings.update(nargs="+", metavar="{" + ",".join(map(str, get_args(parts[0]))) + "}")
    elif get_origin(kind) is tuple:
        settings.update(nargs=len(parts), metavar="X")
    else:
        settings["metavar"] = {int: "N", float: "X", str: "NAME"}[kind]
    group.add_argument(f"--{name.replace('_', '-')}", **settings)


def _read(value: Any, field: FieldInfo) -> Any:
    """Return what was typed as the field takes it: lists may be joined by commas, and None is a word."""
    if isinstance(value, list):
        value = [part for text in value for part in text.split(",") if part]
    empty = value in ("none", "None", ["none"], ["None"])
    return None if empty and NoneType in _kinds(field.annotation) else value


def _kinds(annotation: Any) -> list[Any]:
    """Return the types that an annotation allows, without constraints."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    return [annotation]


def _shown(default: Any) -> str:
    if isinstance(default, bool) or default is None:
        return {True: "on", False: "off", None: "none"}[default]
    if isinstance(default, tuple):
        return " ".join(map(_shown, default))
    return f"{default:.4g}" if isinstance(default, float) else str(default)

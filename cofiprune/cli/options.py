"""Options: a parser whose complaints are one line, and the fields of the settings models as options."""

from __future__ import annotations

import argparse
import json
import os
import textwrap
from collections.abc import Callable, Container, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from cofiprune.errors import CofipruneError, explained, located, suggest
from cofiprune.training.config import PruneConfig
from cofiprune.training.settings import Settings, TrainingSettings


class UsageError(CofipruneError, ValueError):
    """A command line that cannot be understood."""


class Parser(argparse.ArgumentParser):
    """Takes `--batch_size` for `--batch-size`, and no abbreviations: they would hide slips."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def format_help(self) -> str:
        """Return the help, whose groups come before the options of every command."""
        self._action_groups.sort(key=lambda group: group is self._optionals)
        return super().format_help()

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse arguments, options in either spelling.

        :raises UsageError: when they cannot be understood.
        """
        arguments = self._with_file(arguments)
        end = list(arguments).index("--") if "--" in arguments else len(arguments)
        return self.parse_args([*map(self._dashed, arguments[:end]), *arguments[end:]])

    def _with_file(self, arguments: Sequence[str]) -> list[str]:
        """Make the options of a `--config` file the defaults, so that those that are typed go on top of them."""
        at = next((n for n, word in enumerate(arguments) if word.partition("=")[0] == "--config"), None)
        if at is None or "--config" not in self._option_string_actions:
            return list(arguments)
        _, equals, name = arguments[at].partition("=")
        rest = arguments[at + 1 :] if equals else arguments[at + 2 :]
        file = name or next(iter(arguments[at + 1 :]), "")
        known = {action.dest: action for action in self._actions}
        for option, value in _read_config(file, known).items():
            if option not in known:
                raise UsageError(f"{file}: unknown option {option!r}.{suggest(option, known)}")
            if value is None and option not in PruneConfig.model_fields:
                continue
            known[option].required = False
            with located(f"{file}: {option}: ", UsageError):
                self.set_defaults(**{option: _as_typed(value, known[option])})
        return [*arguments[:at], *rest]

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


def _read_config(name: str, known: Container[str]) -> dict[str, Any]:
    """Read options by name from a JSON or YAML file; of the `result.json` of a run, those of its settings that are.

    :param known: names of options.
    :raises UsageError: when there is no such file, or it holds something else.
    """
    with explained(UsageError, f"--config {name} cannot be read", Exception):
        text = Path(name).expanduser().read_text(encoding="utf-8")
        entries = import_module("yaml").safe_load(text) if name.endswith((".yaml", ".yml")) else json.loads(text)
        if not isinstance(entries, dict):
            raise ValueError(f"it holds a {type(entries).__name__} instead of options by name")
    if "settings" in entries:
        return {option: value for option, value in entries["settings"].items() if option in known}
    return {str(option).replace("-", "_"): value for option, value in entries.items()}


def _as_typed(value: Any, action: argparse.Action) -> Any:
    """Return a value as the parser has it from a command line: texts, and whether a switch is on.

    :raises UsageError: for a value that the option could not be given there.
    """
    switch, checked_later = action.nargs == 0, action.dest in PruneConfig.model_fields  # by its type
    if switch and not isinstance(value, bool) and not (value is None and checked_later):
        raise UsageError(f"takes true or false, not {value!r}")
    if isinstance(value, dict) or (action.nargs is None and isinstance(value, list | bool) and not checked_later):
        raise UsageError(f"takes one value, not {value!r}")
    if isinstance(value, list | tuple):
        return [str(part) for part in value]
    return value if isinstance(value, bool) else "none" if value is None else str(value)


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


def numbers(text: str) -> float | list[float]:
    """The type of an argument that is one number, or several joined by commas."""
    found = [float(part) for part in text.split(",")]
    return found if len(found) > 1 else found[0]


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
        title = f"{model.__name__.removesuffix('Settings').lower()} settings"
        group = parser.add_argument_group(title, textwrap.fill(f"{model.__doc__} None is spelled none.", 76))
        kinds = get_type_hints(model)
        for name, field in model.model_fields.items():
            if name in Settings.model_fields and not issubclass(model, TrainingSettings):
                continue  # what all have stands there
            text = f"{' '.join((field.description or '').split())} (default: {_shown(field.default)})"
            text = argparse.SUPPRESS if name in hidden else text.replace("%", "%%")
            option = f"--{name.replace('_', '-')}"
            group.add_argument(option, default=argparse.SUPPRESS, help=text, **_form(kinds[name]))


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the command line gives, by name; lists may be joined by commas, and None is a word."""
    given = {name: value for name, value in vars(options).items() if name in PruneConfig.model_fields}
    for name, value in given.items():
        parts = [part for text in value for part in text.split(",") if part] if isinstance(value, list) else value
        given[name] = None if parts in ("none", ["none"]) else parts
    return given


def _form(annotation: Any) -> dict[str, Any]:
    """Say how an option of a type is typed: its action, the number of its values and how the help calls them."""
    allowed = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    kind = next(part for part in allowed if part is not NoneType)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    parts = get_args(kind)
    if get_origin(kind) is tuple and parts[-1] is Ellipsis:
        return {"nargs": "+", "metavar": _braced(get_args(parts[0]))}
    if get_origin(kind) is tuple:
        return {"nargs": len(parts), "metavar": "X"}
    return {"metavar": _braced(parts) if parts else {int: "N", float: "X", str: "NAME"}[kind]}


def _braced(choices: Iterable[object]) -> str:
    return "{" + ",".join(map(str, choices)) + "}"


def _shown(default: Any) -> str:
    if isinstance(default, bool) or default is None:
        return {True: "on", False: "off", None: "none"}[default]
    if isinstance(default, tuple):
        return " ".join(map(_shown, default))
    return f"{default:.4g}" if isinstance(default, float) else str(default)

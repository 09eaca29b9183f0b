"""An argument parser whose complaints are one line and explain a misspelt option."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from cofiprune.errors import CofipruneError, suggest


class UsageError(CofipruneError, ValueError):
    """A command line that cannot be understood."""


class Parser(argparse.ArgumentParser):
    """Takes `--batch_size` for `--batch-size`, and no abbreviations: they would hide slips.

    :param keep_lines: print description and epilog as they are broken into lines.
    """

    def __init__(
        self,
        *,
        prog: str,
        description: str,
        usage: str | None = None,
        epilog: str | None = None,
        keep_lines: bool = False,
    ) -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter if keep_lines else argparse.HelpFormatter,
            allow_abbrev=False,
        )

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse arguments, options in either spelling.

        :raises UsageError: when they cannot be understood.
        """
        end = list(arguments).index("--") if "--" in arguments else len(arguments)
        return self.parse_args([*map(self._dashed, arguments[:end]), *arguments[end:]])

    def _dashed(self, argument: str) -> str:
        """An option as it was declared; complaining here, unknown ones come before what is missing."""
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
    """The type of an argument that takes one of some words, and suggests the nearest for any other."""
    known = tuple(choices)

    def chosen(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(
                f"unknown {noun} {text!r}.{suggest(text, known)} One of {', '.join(known)}"
            )
        return text

    return chosen


def at_least(smallest: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number no smaller than `smallest`."""

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

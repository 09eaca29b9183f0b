"""The errors of the project: each says what was asked, what was found and what is possible."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
_AS_NEAR = 0.08
"""Difference in likeness, in [0, 1], up to which two names are both what may be meant."""


class CofipruneError(Exception):
    """Root of every error that this package raises on purpose."""


class StructureError(CofipruneError, ValueError):
    """A model, unit kind or group that the structure does not have."""


class UnknownGroupError(StructureError, KeyError):
    """A group that a structure, or a registry of masks, does not have; a `KeyError` too, as of every mapping."""

    # A KeyError shows the repr of its message.
    __str__ = Exception.__str__


class AdapterError(CofipruneError, TypeError):
    """No adapter for a model, or an adapter whose description does not fit the model."""


class MaskError(CofipruneError, ValueError):
    """A mask of the wrong length, or a value outside [0, 1]."""


class PlanError(CofipruneError, ValueError):
    """A plan that is malformed or belongs to another model."""


class TargetError(CofipruneError, ValueError):
    """A sparsity target that is not a fraction, or that the structure cannot reach."""


class SettingsError(CofipruneError, ValueError):
    """An unknown setting, or one with a value out of range."""


class ArgumentError(SettingsError, TypeError):
    """A keyword argument that a function does not have; a `TypeError` too, as Python raises it."""


class DataError(CofipruneError, ValueError):
    """A data set that is empty, unlabelled where labels are needed, or out of the model's range."""


class TeacherError(CofipruneError, ValueError):
    """A teacher that cannot teach this student."""


class CheckpointError(CofipruneError, ValueError):
    """A checkpoint that is missing, damaged, of another run or of a newer version."""


class StorageError(CheckpointError, OSError):
    """A file that cannot be written: no space left, or no permission."""


class TrainingError(CofipruneError, RuntimeError):
    """Training that cannot go on, for example a loss that is not a number."""


class ExportError(CofipruneError, RuntimeError):
    """A model that cannot be exported, whose export computes something else, or whose int8 form scores too little."""


class LawError(CofipruneError, AssertionError):
    """A law of the masks that does not hold for an adapter; names the parameter at fault."""


@contextmanager
def explained(error: type[CofipruneError], problem: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions of some kinds into an error that states the problem, followed by their message on one line.

    `Exception` stands for those of other packages: an error of this one explains itself.
    """
    try:
        yield
    except kinds as found:
        if kinds == (Exception,) and isinstance(found, CofipruneError):
            raise
        raise error(f"{problem}: {one_line(found)}") from found


@contextmanager
def located(where: str, kind: type[CofipruneError] = DataError) -> Iterator[None]:
    """Begin the messages of one kind of error with where it was found; errors of the user's own code get a note."""
    try:
        yield
    except kind as error:
        raise kind(f"{where}{error}") from error.__cause__
    except Exception as error:
        error.add_note(where.removesuffix(": "))
        raise


def one_line(error: Exception) -> str:
    """Return the beginning of an error's message on one line; the name of its class where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


def suggest(word: str, choices: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest of `choices`, or "" when none is near.

    >>> suggest("epoch", ["epochs", "seed"])
    " Did you mean 'epochs'?"
    """
    near = difflib.get_close_matches(word, list(choices), n=3, cutoff=0.6)
    alike = [difflib.SequenceMatcher(None, name, word).ratio() for name in near]
    near = [name for name, ratio in zip(near, alike, strict=True) if ratio > alike[0] - _AS_NEAR]
    return f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""


def arguments_of(function: Callable[..., Any]) -> list[str]:
    """Return the names that a function's arguments can be given by."""
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, parameter in inspect.signature(function).parameters.items() if parameter.kind in by_name]


def names_checked(function: Callable[P, T]) -> Callable[P, T]:
    """Have a function refuse keyword arguments that it does not have by naming the nearest that it has.

    :raises ArgumentError: from the function, for such an argument.
    """
    known = arguments_of(function)

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            if name not in known:
                near = suggest(name, known) or f" It takes {', '.join(known)}."
                raise ArgumentError(f"{function.__name__} has no argument {name!r}.{near}")
        return function(*args, **kwargs)

    return checked

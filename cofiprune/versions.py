"""Releases that this package does not work with are refused in one line, before anything of them is used."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

OLDEST = {"torch": (2, 6), "transformers": (5, 17)}


def check(found: Callable[[str], str] = version) -> None:
    """Make sure that what is installed is new enough.

    :param found: returns the version of a package.
    :raises ImportError: saying what is needed and what is there.
    """
    if sys.version_info < (3, 11):  # noqa: UP036  # a path on PYTHONPATH is installed by nobody
        raise ImportError(f"cofiprune needs Python 3.11 or newer; this is {sys.version.split()[0]}")
    for name, oldest in OLDEST.items():
        try:
            text = found(name)
        except PackageNotFoundError:
            continue  # the import itself will say so
        if tuple(int(number) for number in re.findall(r"\d+", text)[:2]) < oldest:
            needed = ".".join(map(str, oldest))
            raise ImportError(
                f"cofiprune needs {name} {needed} or newer, and {text} is installed: pip install '{name}>={needed}'"
            )


check()

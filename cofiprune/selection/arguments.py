"""Values of the arguments that ask for a target, checked as far as that goes without a model."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

from cofiprune.errors import TargetError

DEFAULT_SPARSITY = 0.9
"""The target where none is given."""


def parse_target(arguments: Mapping[str, Any]) -> tuple[str, float | list[float]]:
    """Return the name and the value of the one argument that is given.

    :param arguments: by the name of the argument; None for those not given.
    :return: the value is a list, in ascending order, where `target_sparsity` is one.
    :raises TargetError: for more than one, a value out of range, and a list that is empty or has a sparsity twice.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    if len(given) > 1:
        listed = " and ".join(f"{name}={value!r}" for name, value in given.items())
        raise TargetError(f"{listed} are given; a run has one target, so leave all but one out")
    name, value = next(iter(given.items()), ("target_sparsity", DEFAULT_SPARSITY))
    if name == "target_sparsity" and isinstance(value, list | tuple):
        several = sorted(check_fraction(each) for each in value)
        if not several or len(set(several)) < len(several):
            raise TargetError(f"target_sparsity={list(value)}: a list takes different sparsities, at least one")
        return name, several
    if name in ("target_sparsity", "target_model_sparsity"):
        return name, check_fraction(value, name)
    found = check_positive(value, name)
    if name == "target_macs" and found < 1:
        raise TargetError(
            f"target_macs is the number of multiply-accumulates that may be left, not a share of them: got {found:g}. "
            f"For that share of a model pass {found:g} * cofiprune.summary(model).macs"
        )
    return name, found


def check_fraction(target: Any, name: str = "target_sparsity") -> float:
    """Return a sparsity target as a float in (0, 1).

    :raises TargetError: for anything else; a percentage is recognised and the fraction suggested.
    """
    if isinstance(target, bool) or not isinstance(target, Real):
        raise TargetError(f"{name} takes a number in (0, 1), not {target!r}")
    value = float(target)
    if 0 < value < 1:
        return value
    hint = f"; {value:g} % is {name}={value / 100:g}" if 1 < value < 100 else ""
    raise TargetError(f"{name} is the share removed and lies in (0, 1); got {value:g}{hint}")


def check_positive(target: Any, name: str) -> float:
    """Return a target as a finite float above 0.

    :raises TargetError: for anything else.
    """
    if isinstance(target, bool) or not isinstance(target, Real):
        raise TargetError(f"{name} takes a number, not {target!r}")
    value = float(target)
    if not 0 < value < float("inf"):
        raise TargetError(f"{name} takes a number above 0; got {value:g}")
    return value

"""Pruning targets: a cost, and how much of it may be left; and the arguments that ask for one.

Parameters of the layers, parameters of the model, multiply-accumulates and measured time differ in the cost and in how
people ask for them; everything that decides what stays knows only this one type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from statistics import median
from typing import TYPE_CHECKING, Any

from cofiprune.accounting import Cost, amount, layer_parameters
from cofiprune.adapter import structure as structure_of
from cofiprune.errors import TargetError
from cofiprune.plan import Plan
from cofiprune.structure import Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_SPARSITY = 0.9
"""The target where none is given."""
TOLERANCE = 0.005
_NEAR, _NEAR_IN_TIME = 0.6 * TOLERANCE, 0.01
"""Distance from the budget within which the choice that loses the least is taken: as a share of the cost of the model
that is cut; where the cost is measured, of the budget, so that a correction has something to go by."""
_CLOSE = 0.015
"""Measurements of one model differ by about as much on a quiet machine."""
_ROUNDS, _LAST = 8, 6
"""Measurements at most, and of how many the median is what the next decision goes by: on a busy machine single ones
of one model were seen to differ by 3 % (standard deviation), and some by much more."""

CostOf = Callable[[Structure], Cost]
FILE = "target_file_mb"
MB = 10**6
_FILL, _NEAR_FILE = 0.993, 0.007
"""What is aimed at of the size that a file may have, and the tolerance as a share of that: it ends a little below."""
_SHARES = {"target_sparsity": "sparsity", "target_model_sparsity": "model sparsity"}
"""Arguments that take a removed share, and what messages call it."""


@dataclass(frozen=True)
class Target:
    """A cost and a budget of it. The argument that asked for it only matters for messages."""

    name: str
    """The argument: `target_` followed by `sparsity`, `model_sparsity`, `macs`, `file_mb`, `speedup`, `latency_ms`."""
    requested: float
    """Its value."""
    cost: CostOf
    """The cost of a model of the family, dense or smaller."""
    total: int
    """The cost of the dense model."""
    budget: float
    """The cost that may remain, in (0, total)."""
    setting: str = ""
    """Under which conditions it is counted, for messages; empty where there are none."""
    slack: float = 0.0
    """Tolerance as a share of the budget, where that is more than `TOLERANCE` of the dense model's cost."""
    round_to: int = 1
    """Kept feed-forward and hidden dimensions are multiples of it."""
    uniform: bool = False
    """Every layer that stays has the same shape."""
    tied_heads: bool = False
    """With `uniform`: heads and hidden dimensions go in the same share."""
    measure: Callable[[PreTrainedModel], float] | None = None
    """Measures what a compacted model really costs, where the cost is an estimate."""

    @classmethod
    def of(cls, structure: Structure, share: float, *, round_to: int = 1) -> Target:
        """A share to remove of the parameters that the encoder's layers have in some structure."""
        total = layer_parameters(structure).exact(structure.sizes)
        return cls.create("target_sparsity", share, layer_parameters, total, round_to=round_to)

    @classmethod
    def create(cls, name: str, requested: float, cost: CostOf, total: int, **settings: Any) -> Target:
        """Make the target that an argument asks for; the budget follows from its value.

        :param total: the cost of the dense model.
        :raises TargetError: when that is not more than what is asked for.
        """
        if name in _SHARES:
            budget = (1 - requested) * total
        else:
            times = {"target_speedup": total / requested, "target_latency_ms": 1e6 * requested}
            budget = _FILL * MB * requested if name == FILE else times.get(name, requested)
        target = cls(name, requested, cost, total, budget, **settings)
        if 0 < total <= target.limit:  # where nothing is left to remove, `check_target` says so
            raise TargetError(
                f"{name}={requested:g}: the model takes {target.text(total)} already; a target lies below that"
            )
        return target

    @property
    def limit(self) -> float:
        """The cost that the argument's value stands for: the budget, but for a file, which must not be larger."""
        return self.budget / _FILL if self.name == FILE else self.budget

    @property
    def tolerance(self) -> float:
        """Greatest distance of the final cost from the budget, as a share of the dense model's cost."""
        if self.name == FILE:
            return _NEAR_FILE * self.budget / self.total
        return max(TOLERANCE, self.slack * self.budget / self.total)

    def tie_width(self, here: float) -> float:
        """Distance from the budget within which the choice that loses the least is taken, for a model of some cost."""
        if self.name == FILE:
            return 0.6 * _NEAR_FILE * self.budget
        return _NEAR_IN_TIME * self.budget if self.slack else _NEAR * here

    def needs_levels(self, structure: Structure) -> bool:
        """Return whether sizes of whole groups have to be decided together, not unit by unit."""
        return self.uniform or self.round_to > 1 or not self.cost(structure).linear

    @property
    def share(self) -> float:
        """Share of the cost to remove, in (0, 1)."""
        return 1 - self.budget / self.total

    def at(self, share: float) -> Target:
        """Return the same target with another share to remove, without measuring."""
        return replace(self, budget=(1 - share) * self.total, measure=None)

    def removed(self, structure: Structure) -> float:
        """Share to remove of what a smaller model costs; 0 or less where it meets the target already."""
        here = self.cost(structure).exact(structure.sizes)
        return 1 - self.budget / here if here else 0.0

    def kept_share(self, structure: Structure) -> float:
        """The cost of a model by that of the dense one."""
        return self.cost(structure).exact(structure.sizes) / self.total

    def is_met(self, structure: Structure, sizes: Mapping[str, int]) -> bool:
        """Return whether some sizes of the groups meet the budget within the tolerance."""
        return abs(self.cost(structure).exact(sizes) - self.budget) <= self.tolerance * self.total

    def check(self, structure: Structure, sizes: Mapping[str, int]) -> None:
        """Raise a `TargetError` where sizes do not meet the target."""
        if not self.is_met(structure, sizes):
            raise TargetError(f"the nearest plan to {self} has {self.text(self.cost(structure).exact(sizes))}")

    def settle(self, decide: Callable[[Target], Plan], compacted: Callable[[Plan], PreTrainedModel]) -> Plan:
        """Decide; where the cost is an estimate, measure the outcome, correct the budget by it, and decide again.

        :param decide: returns the plan for a target of this cost.
        :param compacted: returns the model that a plan leaves.
        """
        plan = decide(self)
        if self.measure is None:
            return plan
        off: list[float] = []  # measured by estimated cost, round by round
        tried: list[tuple[float, Plan]] = []
        for _ in range(_ROUNDS):
            small = compacted(plan)
            structure, real = structure_of(small), self.measure(small)
            off.append(real / self.cost(structure).exact(structure.sizes))
            tried.append((abs(real / self.budget - 1), plan))
            if len(tried) > 1 and max(distance for distance, _ in tried[-2:]) <= _CLOSE:
                break  # two measurements in a row: one alone may be luck
            try:
                plan = decide(replace(self, budget=min(self.budget / median(off[-_LAST:]), self.total)))
            except TargetError:  # beyond what the structure allows; what was found is as near as it gets
                return min(tried, key=lambda each: each[0])[1]
        return plan

    def value_of(self, cost: float) -> float:
        """Return the value of the argument that asks for a cost: the inverse of how the budget is made."""
        if self.name in _SHARES:
            return 1 - cost / self.total
        values = {"target_speedup": self.total / cost, "target_latency_ms": cost / 1e6, FILE: cost / MB}
        return values.get(self.name, cost)

    def text(self, cost: float) -> str:
        """Write a cost in the words of the argument."""
        value = self.value_of(cost)
        if self.name in _SHARES:
            return f"{_SHARES[self.name]} {round(value, 4 if value < 0.999 else 6):g}"
        if self.name == "target_speedup":
            return f"a speed-up of {value:.3g} {self.setting}"
        if self.name == "target_latency_ms":
            return f"{value:.4g} ms {self.setting}"
        if self.name == FILE:
            return f"a file of {value:.4g} MB {self.setting}"
        return f"{amount(round(value))} MACs {self.setting}"

    def __str__(self) -> str:
        return self.text(self.limit)

    def identity(self) -> dict[str, Any]:
        """Return what a resumed run must have in common with this one, as plain values."""
        return {self.name: self.requested, **({"target_setting": self.setting} if self.setting else {})}


def parse_target(arguments: Mapping[str, Any]) -> tuple[str, float | list[float]]:
    """Return the name and the value of the one argument that is given, checked as far as that goes without a model.

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
    if name in _SHARES:
        return name, check_fraction(value, name)
    found = _number(value, name)
    if not 0 < found < float("inf"):
        raise TargetError(f"{name} takes a number above 0; got {found:g}")
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
    value = _number(target, name, " in (0, 1)")
    if 0 < value < 1:
        return value
    hint = f"; {value:g} % is {name}={value / 100:g}" if 1 < value < 100 else ""
    raise TargetError(f"{name} is the share removed and lies in (0, 1); got {value:g}{hint}")


def _number(target: Any, name: str, within: str = "") -> float:
    if isinstance(target, bool) or not isinstance(target, Real):
        raise TargetError(f"{name} takes a number{within}, not {target!r}")
    return float(target)

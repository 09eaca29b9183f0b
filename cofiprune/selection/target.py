"""What a model is pruned to: a cost, and how much of it may be left.

Parameters of the layers, parameters of the model, multiply-accumulates and measured time differ in the cost and in how
people ask for them (`Scale`); everything that decides what stays knows only this one type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from statistics import median
from typing import TYPE_CHECKING, Any

from cofiprune.accounting import Cost, layer_parameters
from cofiprune.adapter import structure as structure_of
from cofiprune.errors import TargetError
from cofiprune.plan import Plan
from cofiprune.structure import Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 0.005
_NEAR = 0.6
"""How near to the target, in tolerances, choices are compared by what they lose."""
_NEAR_IN_TIME = 0.01
"""The same where what is left is measured, as a share of that, so that a correction has something to go by."""
_CLOSE = 0.015
"""Measurements of one model differ by about as much on a quiet machine."""
_ROUNDS, _LAST = 8, 6
"""Measurements at most, and of how many the median is what the next decision goes by: on a busy machine single ones
of one model were seen to differ by 3 % (standard deviation), and some by much more."""

CostOf = Callable[[Structure], Cost]


@dataclass(frozen=True)
class Scale:
    """How people ask for an amount of a cost."""

    name: str
    """The argument that takes it."""
    left: Callable[[float, float], float]
    """From what was asked, and the cost of the dense model, to the cost that may be left."""
    asked: Callable[[float, float], float]
    """The inverse: from a cost that is left, and that of the dense model."""
    text: Callable[[float], str]
    """How messages print it."""


def share_removed(name: str, noun: str) -> Scale:
    """The scale of a removed share, in (0, 1)."""
    return Scale(
        name,
        left=lambda asked, total: (1 - asked) * total,
        asked=lambda left, total: 1 - left / total,
        text=lambda asked: f"{noun} {round(asked, 4 if asked < 0.999 else 6):g}",
    )


SPARSITY = share_removed("target_sparsity", "sparsity")
MODEL_SPARSITY = share_removed("target_model_sparsity", "model sparsity")


@dataclass(frozen=True)
class Target:
    """A cost, and how much of it may be left; what it was asked as only matters for messages."""

    scale: Scale
    asked: float
    """The value of the argument."""
    cost: CostOf
    """The cost of a model of the family, dense or smaller."""
    total: int
    """The cost of the dense model."""
    left: float
    """The cost that may be left, in (0, total)."""
    setting: str = ""
    """Under which conditions it is counted, for messages; empty where there are none."""
    slack: float = 0.0
    """How far what is left may be off, as a share of itself, where that is more than `TOLERANCE` of the whole."""
    round_to: int = 1
    """Kept feed-forward and hidden dimensions are multiples of it."""
    uniform: bool = False
    """Every layer that stays has the same shape."""
    tied_heads: bool = False
    """With `uniform`: heads and hidden dimensions go in the same share."""
    measure: Callable[[PreTrainedModel], float] | None = None
    """Measures what a compacted model really costs, where the cost is an estimate."""

    @classmethod
    def of(cls, structure: Structure, share: float, *, cost: CostOf = layer_parameters, round_to: int = 1) -> Target:
        """A removed share of a cost, by default of the parameters of the encoder's layers.

        :param structure: of the model that the share is counted from.
        """
        total = cost(structure).exact(structure.sizes)
        return cls(SPARSITY, share, cost, total, SPARSITY.left(share, total), round_to=round_to)

    @property
    def tolerance(self) -> float:
        """How far the cost may end from what may be left, as a share of the dense model's."""
        return max(TOLERANCE, self.slack * self.left / self.total)

    @property
    def near(self) -> float:
        """How near to what may be left choices are compared by what they lose, as a share of the dense model's cost."""
        return _NEAR_IN_TIME * self.left / self.total if self.slack else _NEAR * TOLERANCE

    def by_levels(self, structure: Structure) -> bool:
        """Whether sizes of whole groups have to be decided together, not unit by unit."""
        return self.uniform or self.round_to > 1 or not self.cost(structure).linear

    @property
    def share(self) -> float:
        """The share of the cost that is to go, in (0, 1)."""
        return 1 - self.left / self.total

    def at(self, share: float) -> Target:
        """The same cost with another share to go; what comes of it is not measured."""
        return replace(self, left=(1 - share) * self.total, measure=None)

    def removed(self, structure: Structure) -> float:
        """The share that is to go of what a smaller model costs; 0 or less where there is nothing more to do."""
        here = self.cost(structure).exact(structure.sizes)
        return 1 - self.left / here if here else 0.0

    def kept_share(self, structure: Structure) -> float:
        """The cost of a model by that of the dense one."""
        return self.cost(structure).exact(structure.sizes) / self.total

    def settle(self, decide: Callable[[Target], Plan], compacted: Callable[[Plan], PreTrainedModel]) -> Plan:
        """Decide; where the cost is an estimate, measure what was decided, and decide again by what it was off.

        :param decide: returns the plan for a target of this cost.
        :param compacted: returns the model that a plan leaves.
        """
        plan = decide(self)
        if self.measure is None:
            return plan
        off: list[float] = []
        """What was measured by what had been estimated, round by round."""
        tried: list[tuple[float, Plan]] = []
        for _ in range(_ROUNDS):
            small = compacted(plan)
            structure, real = structure_of(small), self.measure(small)
            off.append(real / self.cost(structure).exact(structure.sizes))
            tried.append((abs(real / self.left - 1), plan))
            if len(tried) > 1 and max(distance for distance, _ in tried[-2:]) <= _CLOSE:
                break  # once is luck
            try:
                plan = decide(replace(self, left=min(self.left / median(off[-_LAST:]), self.total)))
            except TargetError:  # beyond what the structure allows; what was found is as near as it gets
                return min(tried, key=lambda each: each[0])[1]
        return plan

    def text(self, left: float) -> str:
        """An amount of the cost in the words of the argument."""
        return self.scale.text(self.scale.asked(left, self.total))

    def __str__(self) -> str:
        return self.scale.text(self.asked)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with this one, as plain values."""
        return {self.scale.name: self.asked, **({"target_setting": self.setting} if self.setting else {})}


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

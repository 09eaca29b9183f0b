"""How many units each block gives up, when it is known what each next one costs.

Every block has a curve: the loss against what has been saved of the cost. On the lower convex hulls of these curves
the greedy choice, always the step with the least loss for what it saves, is the best for every budget that it meets
(Everett, 1963). A whole block is the last step of its curve, and goes early where its last units bring less than they
cost.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cofiprune.oneshot.loss_curves import Curve


@dataclass(frozen=True)
class Option:
    """A block, or another group, that can give up units in a fixed order."""

    curve: Curve
    saved: Sequence[float]
    """What is saved when the first 0, 1, 2, ... units are gone; one more than the curve has, ascending from 0."""


def give_up(options: Mapping[str, Option], needed: float) -> dict[str, int]:
    """Return how many units each option gives up, so that about `needed` is saved in all.

    What is saved is as near to it as a single unit of any option can bring it; less where there is no more.
    """
    steps = sorted(
        (slope, name, first, last) for name, option in options.items() for slope, first, last in _hull(option)
    )
    gone = dict.fromkeys(options, 0)
    closed: set[str] = set()
    left = needed
    for _, name, first, last in steps:
        if name in closed:
            continue
        saved = options[name].saved
        for count in range(first + 1, last + 1):
            gain = saved[count] - saved[count - 1]
            if gain > left:
                closed.add(name)  # its next unit is too large; smaller ones of others may still fit
                break
            left -= gain
            gone[name] = count
    return _rounded(options, gone, left)


def _rounded(options: Mapping[str, Option], gone: dict[str, int], left: float) -> dict[str, int]:
    """Give up one more unit where that comes nearer than stopping short.

    Where even that is further off than the smallest unit of all is large, as in a small model of few units, units are
    traded: one more or one fewer of one option, and of another as many as make up for it.
    """

    def distance(found: Mapping[str, int]) -> float:
        saved = (options[name].saved[count] - options[name].saved[gone[name]] for name, count in found.items())
        return abs(left - sum(saved))

    more = [{name: gone[name] + 1} for name, option in options.items() if gone[name] + 1 < len(option.saved)]
    best = min([{}, *more], key=distance)
    units = [after - before for option in options.values() for before, after in itertools.pairwise(option.saved)]
    if distance(best) > min(units, default=math.inf):
        fewer = [{name: count - 1} for name, count in gone.items() if count]
        traded = [_made_up(options, gone, first, name, left) for first in ({}, *more, *fewer) for name in options]
        best = min([best, *traded], key=distance)
    return {**gone, **best}


def _made_up(
    options: Mapping[str, Option], gone: Mapping[str, int], first: Mapping[str, int], name: str, left: float
) -> dict[str, int]:
    """A change of one option, and of another by as many units as bring the sum nearest to what is left to save."""
    saved = options[name].saved
    done = sum(options[other].saved[count] - options[other].saved[gone[other]] for other, count in first.items())
    wanted = saved[gone[name]] + left - (0.0 if name in first else done)
    place = min(bisect.bisect_left(saved, wanted), len(saved) - 1)
    nearest = min({max(place - 1, 0), place}, key=lambda count: abs(saved[count] - wanted))
    return {**first, name: nearest}


def _hull(option: Option) -> list[tuple[float, int, int]]:
    """The steps of the lower convex hull: (loss per saving, units gone before, units gone after)."""
    points = list(zip(option.saved, (0.0, *option.curve.losses), strict=True))

    def slope(first: int, last: int) -> float:
        gain = points[last][0] - points[first][0]
        return (points[last][1] - points[first][1]) / gain if gain > 0 else math.inf

    hull = [0]
    for count in range(1, len(points)):
        while len(hull) > 1 and slope(hull[-2], hull[-1]) >= slope(hull[-1], count):
            hull.pop()
        hull.append(count)
    return [(slope(first, last), first, last) for first, last in itertools.pairwise(hull)]


def savings(cost: Callable[[int], float], units: int) -> list[float]:
    """What is saved with 0, 1, ... of the units gone.

    :param cost: of the whole model with so many units left; linear down to one unit, and with a drop to none.
    """
    whole, one = cost(units), cost(1)
    each = (whole - one) / max(units - 1, 1)
    return [*(each * gone for gone in range(units)), whole - cost(0)]

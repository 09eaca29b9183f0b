"""How many units each block gives up, when it is known what each next one costs.

Every block has a curve: the loss against what has been saved of the cost. On the lower convex hulls of these curves
the greedy choice, always the step with the least loss for what it saves, is the best for every budget that it meets
(Everett, 1963). A whole block is the last step of its curve, and goes early where its last units bring less than they
cost.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cofiprune.oneshot.surgeon import Curve


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
    """Give up one more unit where that comes nearer than stopping short."""
    best, chosen = abs(left), None
    for name, option in options.items():
        if gone[name] + 1 < len(option.saved):
            distance = abs(left - (option.saved[gone[name] + 1] - option.saved[gone[name]]))
            if distance < best:
                best, chosen = distance, name
    return gone if chosen is None else {**gone, chosen: gone[chosen] + 1}


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

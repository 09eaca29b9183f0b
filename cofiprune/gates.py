"""Learnable gates: one hard concrete variable per prunable unit, all of them in one flat parameter.

A gate z in [0, 1] is a stretched and clamped logistic variable, so that it is exactly 0 or 1 with positive probability
and still differentiable in its location log_alpha (Louizos et al., 2018, arXiv:1712.01312). All groups share one
vector, so that sampling, clamping and expectations take a few kernels each, whatever the number of layers.

Shapes: U units of all groups together, G groups, n units of one group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from cofiprune.errors import SettingsError, StructureError, suggest
from cofiprune.structure import Group, Kind

Stretch = tuple[float, float]

TEMPERATURE = 2 / 3
STRETCH: Stretch = (-0.1, 1.1)

COFI_LIMIT = math.log(100)
"""The original's bound on |log_alpha|, the same for every group (arXiv:2204.00408)."""
COFI_INITIAL: Mapping[Kind, float] = {"hidden": 10, "attention": 10, "heads": 10, "ffn": 10, "intermediate": 0}
"""The original's initial log_alpha."""

_NOISE_MARGIN = 1e-6  # the original's epsilon: keeps the logit of the noise finite
_EVALUATION_SCALE = 0.8  # Wang et al. (2020), arXiv:1910.04732: sharpens the gates at evaluation
_EXPECTED_ZEROS_WHEN_OPEN = 0.25  # half of the 0.5 from which the number of zeros would round to 1


def _shift(temperature: float, stretch: Stretch) -> float:
    """Return b with P(z > 0) = sigmoid(log_alpha - b)."""
    low, high = stretch
    return temperature * math.log(-low / high)


def sample(
    log_alpha: Tensor, uniform: Tensor, *, temperature: float = TEMPERATURE, stretch: Stretch = STRETCH
) -> Tensor:
    """Return gates z in [0, 1] drawn by the reparameterisation of Eq. 10-11 of arXiv:1712.01312.

    :param log_alpha: [...] location of each gate; z is differentiable in it wherever 0 < z < 1.
    :param uniform: [...] noise in [0, 1]; its ends are pulled in by 1e-6, as in the original.
    """
    low, high = stretch
    noise = torch.logit(_NOISE_MARGIN + (1 - 2 * _NOISE_MARGIN) * uniform)
    concrete = torch.sigmoid((noise + log_alpha) / temperature)
    return (concrete * (high - low) + low).clamp(0, 1)


def open_probability(log_alpha: Tensor, *, temperature: float = TEMPERATURE, stretch: Stretch = STRETCH) -> Tensor:
    """Return P(z > 0) = sigmoid(log_alpha - temperature * log(-low / high)), Eq. 12 of arXiv:1712.01312."""
    return torch.sigmoid(log_alpha - _shift(temperature, stretch))


def deterministic(log_alpha: Tensor, *, temperature: float = TEMPERATURE, stretch: Stretch = STRETCH) -> Tensor:
    """Return the gates in [0, 1) of one group for evaluation, without gradients.

    round(n - sum of P(z > 0)) units, those with the smallest log_alpha (of equal ones the first), become 0; the
    others are sigmoid(0.8 * log_alpha / temperature). A group of one unit is thus 0 when P(z > 0) < 0.5.

    :param log_alpha: [n].
    """
    log_alpha = log_alpha.detach()
    # 1 - P as a sigmoid of its own: n - sum(P) loses digits when nearly every gate is open.
    zeros = torch.sigmoid(_shift(temperature, stretch) - log_alpha).sum().round()
    rank = torch.argsort(torch.argsort(log_alpha, stable=True))
    return torch.sigmoid(_EVALUATION_SCALE * log_alpha / temperature).masked_fill(rank < zeros, 0.0)


def fully_open_limit(size: int, *, temperature: float = TEMPERATURE, stretch: Stretch = STRETCH) -> float:
    """Return the bound on |log_alpha| of a group of `size` units: the original's, or more where that is too low.

    At the original's bound, log(100), P(z = 0) is 0.002, which is 1.5 of 768 units: such a group could never be fully
    open. Here a group at its bound expects at most 1/4 of a unit to be 0, which rounds to none. The bound is no higher
    than necessary, because saturated gates learn more slowly.

    >>> round(fully_open_limit(12), 2), round(fully_open_limit(768), 2)
    (4.61, 6.43)
    """
    closed = torch.tensor(_EXPECTED_ZEROS_WHEN_OPEN / size, dtype=torch.float64)
    # -logit(closed) is logit(1 - closed) without rounding 1 - closed.
    return max(COFI_LIMIT, -torch.logit(closed).item() + _shift(temperature, stretch))


def noise_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Return a generator on `device` that is a function of (seed, step) alone: the same on every rank.

    The two numbers are mixed by SplitMix64 (Steele et al., 2014), because the CPU's generator uses only the low 32 bits
    of its seed.
    """
    word = (1 << 64) - 1
    mixed = (seed * 0x9E3779B97F4A7C15 + step + 1) & word
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & word
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & word
    return torch.Generator(device).manual_seed(mixed ^ (mixed >> 31))


def _check_settings(
    groups: Sequence[Group], initial: Mapping[Kind, float], *, limit: float | None, temperature: float, stretch: Stretch
) -> None:
    if not groups or len({group.name for group in groups}) < len(groups):
        raise SettingsError("gates need at least one group, and a name of its own for each")
    if not (temperature > 0 and stretch[0] < 0 and stretch[1] > 1):
        raise SettingsError(f"temperature {temperature} must be above 0, stretch {stretch} must contain [0, 1]")
    if limit is not None and not 0 < limit < math.inf:
        raise SettingsError(f"limit is {limit}; it must be positive and finite")
    if any(math.isnan(value) for value in initial.values()):
        raise SettingsError(f"initial is {dict(initial)}; a location must be a number")


class Gates(nn.Module):
    """The gates of a sequence of groups, with their locations in one float32 parameter `log_alpha` [U].

    `sample` gives the same gates on every rank, so that averaging the gradients of `log_alpha` keeps the ranks equal.
    Only `initialise_from` waits for the device. The state dict holds `log_alpha` alone.
    """

    _lengths: Tensor
    _limit: Tensor
    _start: Tensor

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        initial: Mapping[Kind, float] | None = None,
        limit: float | None = None,
        temperature: float = TEMPERATURE,
        stretch: Stretch = STRETCH,
    ) -> None:
        """Set every gate to its initial location.

        :param groups: at least one, with distinct names; their order is the order of every result.
        :param initial: log_alpha by kind, clamped to the limit; a kind that is missing starts at the limit, fully
            open. `COFI_INITIAL` with `limit=COFI_LIMIT` is the original.
        :param limit: bound on |log_alpha| of every group; None for `fully_open_limit` of each.
        :param temperature: above 0.
        :param stretch: (low, high) with low < 0 and high > 1.
        :raises SettingsError: for a value out of range.
        """
        super().__init__()
        starts = dict(initial or {})
        _check_settings(groups, starts, limit=limit, temperature=temperature, stretch=stretch)
        self.groups = tuple(groups)
        self.temperature = temperature
        self.stretch = stretch
        self._sizes = [group.size for group in self.groups]
        lengths = torch.tensor(self._sizes)
        limits = [
            fully_open_limit(size, temperature=temperature, stretch=stretch) if limit is None else limit
            for size in self._sizes
        ]
        self._limits = {group.name: bound for group, bound in zip(self.groups, limits, strict=True)}
        bounds = torch.tensor(limits, dtype=torch.float32)
        start = torch.tensor([starts.get(group.kind, math.inf) for group in self.groups], dtype=torch.float32)
        self.register_buffer("_lengths", lengths, persistent=False)
        self.register_buffer("_limit", bounds.repeat_interleave(lengths), persistent=False)
        self.register_buffer("_start", start.clamp(-bounds, bounds).repeat_interleave(lengths), persistent=False)
        self.log_alpha = nn.Parameter(self._start.clone())

    def by_group(self, flat: Tensor) -> dict[str, Tensor]:
        """Return views of a flat [U] tensor, one [n] per group."""
        return {group.name: part for group, part in zip(self.groups, torch.split(flat, self._sizes), strict=True)}

    def sample(self, seed: int, step: int) -> dict[str, Tensor]:
        """Return random gates [n] in [0, 1] by group: differentiable views of one flat draw.

        :param seed: the run's seed.
        :param step: a number that is never used twice in a run.
        """
        device = self.log_alpha.device
        uniform = torch.rand(len(self.log_alpha), generator=noise_generator(seed, step, device), device=device)
        return self.by_group(sample(self.log_alpha, uniform, temperature=self.temperature, stretch=self.stretch))

    def deterministic(self) -> dict[str, Tensor]:
        """Return the gates [n] in [0, 1) by group for evaluation, without gradients."""
        return {
            name: deterministic(part, temperature=self.temperature, stretch=self.stretch)
            for name, part in self.by_group(self.log_alpha.detach()).items()
        }

    def open_probability(self) -> Tensor:
        """Return P(z > 0) of every unit, [U], differentiable."""
        return open_probability(self.log_alpha, temperature=self.temperature, stretch=self.stretch)

    def expected_sizes(self) -> Tensor:
        """Return the expected number of open units of every group, [G] in the order of `groups`, differentiable."""
        # A segmented sum has a fixed order of addition, unlike index_add on a GPU. `unsafe` skips a check of the
        # lengths, which would wait for the device; they are right by construction.
        return torch.segment_reduce(self.open_probability(), "sum", lengths=self._lengths, unsafe=True)

    def limit_of(self, group: Group) -> float:
        """Return the bound on |log_alpha| of a group."""
        return self._limits[group.name]

    @torch.no_grad()
    def clamp_(self) -> None:
        """Clamp every log_alpha to its limit; to be called after each step of the optimiser."""
        self.log_alpha.clamp_(-self._limit, self._limit)

    @torch.no_grad()
    def initialise_from(self, importance: Mapping[str, Tensor], *, spread: float = 1.0) -> None:
        """Set every gate to its initial location, less important units up to `spread` lower.

        The most important unit of a group keeps the initial log_alpha, the others follow by rank (equal ones share
        their mean rank), so that sparsity pressure closes unimportant units first. Groups of one unit are ranked with
        the others of their kind. With the default limit and a spread of at most 1, every group is still fully open.

        :param importance: [n] by group name, on any scale; a missing group keeps its initial value.
        :param spread: in units of log_alpha, at least 0.
        :raises SettingsError: for a negative spread or an importance that is not finite.
        :raises StructureError: for an unknown group or a wrong length.
        """
        if not 0 <= spread < math.inf:
            raise SettingsError(f"spread is {spread}; it must be at least 0 and finite")
        self._check(importance)
        self.log_alpha.copy_(self._start)
        by_group = self.by_group(self.log_alpha)
        for names in self._cohorts(importance):
            scores = torch.cat([importance[name].detach().to(self.log_alpha.device) for name in names])
            _, level, counts = torch.unique(scores, return_inverse=True, return_counts=True)
            rank = counts.cumsum(0) - (counts + 1) / 2
            shift = spread * (rank - rank[-1]) / max(len(scores) - 1, 1)
            sizes = [len(by_group[name]) for name in names]
            for name, part in zip(names, torch.split(shift[level], sizes), strict=True):
                by_group[name].add_(part)
        self.clamp_()

    def _check(self, importance: Mapping[str, Tensor]) -> None:
        sizes = {group.name: group.size for group in self.groups}
        for name, scores in importance.items():
            if name not in sizes:
                raise StructureError(f"these gates have no group {name!r}.{suggest(name, sizes)}")
            if scores.shape != (sizes[name],):
                raise StructureError(f"importance of {name!r} is {list(scores.shape)}; it has {sizes[name]} units")
            if not torch.isfinite(scores).all():
                raise SettingsError(f"the importance of {name!r} has values that are not finite")

    def _cohorts(self, importance: Mapping[str, Tensor]) -> Iterator[list[str]]:
        """Yield the names of the groups that are ranked together."""
        together: dict[Kind, list[str]] = {}
        for group in self.groups:
            if group.name in importance:
                if group.size == 1:
                    together.setdefault(group.kind, []).append(group.name)
                else:
                    yield [group.name]
        yield from together.values()


def gate_cut(gates: Gates, keep: Mapping[str, Sequence[int]]) -> Callable[[Tensor], Tensor]:
    """Return a function that cuts a tensor with an element per gate to the kept gates.

    :param keep: kept indices by group.
    """
    rows = gates.by_group(torch.arange(sum(group.size for group in gates.groups)))
    index = torch.cat([part[list(keep[name])] for name, part in rows.items()])
    return lambda value: value.detach().index_select(0, index.to(value.device))

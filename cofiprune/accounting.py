"""Counting parameters and multiply-accumulates: exact for a plan, expected and differentiable for gates.

Every parameter is a rectangle, so its size is its fixed part times the kept units of each of its sides, times the gate
of its block. Summed over a model this is one polynomial in the group sizes, with a coefficient per distinct set of
groups. Exact counts evaluate it at whole numbers, expected counts at the sums of P(z > 0) (the gates are independent,
and no side appears twice under one gate).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from cofiprune.structure import Parameter, Structure

Term = tuple[str, ...]
_HEADER = 48
"""Bytes of a file of safetensors before the entries of its header: its length, the format, and padding."""


class Cost(Protocol):
    """The cost of a model as a function of the sizes of its groups: parameters, operations or time.

    A removed block has a size of 0 for its gate, and costs nothing.
    """

    @property
    def linear(self) -> bool:
        """True if each unit of a group costs the same, whatever their number."""

    def exact(self, kept: Mapping[str, int]) -> int:
        """Evaluate at whole numbers of kept units."""

    def along(self, kept: Mapping[str, int], name: str, counts: Sequence[int]) -> list[int]:
        """Evaluate with one group at each of several sizes, the others as in `kept`."""

    def expected(self, sizes: Tensor) -> Tensor:
        """Evaluate at expected sizes, [groups] in the order of `Structure.groups`; a scalar, differentiable."""


@dataclass(frozen=True)
class Polynomial(Cost):
    """A cost that is a polynomial in the sizes of the groups, of degree one in each."""

    groups: tuple[str, ...]
    """Names of the variables, in the order of `Structure.groups`."""
    terms: Mapping[Term, int]
    """Coefficient by the sorted names of the groups multiplied."""
    _tensors: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def linear(self) -> bool:
        return True

    def exact(self, kept: Mapping[str, int]) -> int:
        return sum(coefficient * math.prod(kept[name] for name in names) for names, coefficient in self.terms.items())

    def along(self, kept: Mapping[str, int], name: str, counts: Sequence[int]) -> list[int]:
        nothing = self.exact({**kept, name: 0})
        each = self.exact({**kept, name: 1}) - nothing
        return [nothing + count * each for count in counts]

    def expected(self, sizes: Tensor) -> Tensor:
        coefficients, indices = self._on(sizes.device, sizes.dtype)
        padded = torch.cat([sizes, sizes.new_ones(1)])
        return torch.dot(coefficients, padded[indices].prod(dim=1))

    def _on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Coefficients [terms] and group indices [terms, degree], padded with the index of a constant 1."""
        if (device, dtype) not in self._tensors:
            position = {name: index for index, name in enumerate(self.groups)}
            degree = max((len(names) for names in self.terms), default=0)
            padding = len(self.groups)
            indices = [[*map(position.__getitem__, names), *[padding] * (degree - len(names))] for names in self.terms]
            coefficients = torch.tensor(list(self.terms.values()), dtype=torch.float64)
            self._tensors[device, dtype] = (coefficients.to(device, dtype), torch.tensor(indices, device=device))
        return self._tensors[device, dtype]


def layer_parameters(structure: Structure) -> Polynomial:
    """Count the parameters of the encoder's layers: weights, biases and norms; the denominator of `sparsity`."""
    return _parameters(structure, structure.in_layers)


def model_parameters(structure: Structure) -> Polynomial:
    """Count every parameter of the model."""
    return _parameters(structure, lambda parameter: True)


def embedding_parameters(structure: Structure) -> Polynomial:
    """Count the parameters of the embedding tables."""
    tables = set(structure.embeddings)
    return _parameters(structure, lambda parameter: parameter.name in tables)


def file_bytes(structure: Structure, sizes: Mapping[str, int], fixed: int = 0) -> Polynomial:
    """Count the bytes of a model's file in the format of safetensors, its header included.

    :param sizes: bytes of an element, by the name of the parameter.
    :param fixed: bytes of what does not change, such as buffers.
    """
    found: list[tuple[Iterable[str | None], int]] = [((), fixed + _HEADER)]
    total = sum(math.prod(parameter.shape) * sizes[parameter.name] for parameter in structure.parameters)
    for parameter in structure.parameters:
        shape = ",".join(map(str, parameter.shape))
        entry = len(f'"{parameter.name}":{{"dtype":"F32","shape":[{shape}],"data_offsets":[{total},{total}]}},')
        found += [((parameter.gate,), entry), (_groups(parameter), parameter.fixed * sizes[parameter.name])]
    return _polynomial(structure, found)


def layer_macs(structure: Structure, seq_len: int) -> Polynomial:
    """Count the multiply-accumulates of the encoder's layers for one example of `seq_len` tokens."""
    return _macs(structure, seq_len, structure.in_layers)


def model_macs(structure: Structure, seq_len: int) -> Polynomial:
    """Count the multiply-accumulates of the model for one example of `seq_len` tokens; lookups cost nothing."""
    return _macs(structure, seq_len, lambda parameter: True)


def sparsity(cost: Cost, structure: Structure, kept: Mapping[str, int]) -> float:
    """Return the removed share of a cost, in [0, 1]."""
    return 1 - cost.exact(kept) / cost.exact(structure.sizes)


def amount(value: float) -> str:
    """Write a large number with three significant digits.

    >>> amount(109_482_240), amount(1_250), amount(17)
    ('109 M', '1.25 k', '17')
    """
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            scaled = value / limit
            digits = 0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2
            return f"{scaled:.{digits}f} {letter}"
    return f"{value:g}"


def _polynomial(structure: Structure, entries: Iterable[tuple[Iterable[str | None], int]]) -> Polynomial:
    """The sum of some products: the names of groups, None among them for nothing, and their coefficient."""
    terms: defaultdict[Term, int] = defaultdict(int)
    for names, coefficient in entries:
        if coefficient:
            terms[tuple(sorted(filter(None, names)))] += coefficient
    return Polynomial(tuple(structure), dict(terms))


def _groups(parameter: Parameter) -> list[str | None]:
    return [parameter.gate, *(side.group for side in parameter.prunable.values())]


def _parameters(structure: Structure, chosen: Callable[[Parameter], bool]) -> Polynomial:
    return _polynomial(structure, ((_groups(p), p.fixed) for p in structure.parameters if chosen(p)))


def _macs(structure: Structure, seq_len: int, chosen: Callable[[Parameter], bool]) -> Polynomial:
    entries = [
        (_groups(p), p.fixed * (p.applications[0] * seq_len + p.applications[1]))
        for p in structure.parameters
        if chosen(p)
    ]
    for block in structure.blocks:
        entries.append(([block.gate, block.inner], block.pairwise * seq_len**2 + block.per_token * seq_len))
    return _polynomial(structure, entries)

"""A plan: the kept units of a model, frozen, printable and serialisable.

Gates and masks lead to a decision; a plan is the decision. It is complete before anything is cut (`compact` only
carries it out), and canonical: a block with a closed gate, or without inner units, is removed with gate and units.
"""

from __future__ import annotations

import math
from collections.abc import ItemsView, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

from torch import Tensor

from cofiprune.drawing import counted, structure_map
from cofiprune.errors import MaskError, PlanError
from cofiprune.files import STRICT, check_format, read_json, validated, write_json
from cofiprune.structure import Structure

_FORMAT_VERSION = 1


class _Masks(Protocol):
    """A `MaskRegistry`, whose module imports this one."""

    @property
    def structure(self) -> Structure: ...
    def items(self) -> ItemsView[str, Tensor]: ...


def check_mask(name: str, value: Tensor, size: int) -> list[float]:
    """Check a mask, and return its values.

    :param size: units of its group.
    :raises MaskError: for another shape than [units], or a value that is not a number in [0, 1].
    """
    if value.shape != (size,):
        raise MaskError(f"mask {name!r} takes {size} values, one per unit; got shape {tuple(value.shape)}")
    row: list[float] = value.detach().double().cpu().tolist()
    if not all(map(math.isfinite, row)):
        raise MaskError(f"mask {name!r} has values that are not numbers: {row}")
    if min(row) < 0 or max(row) > 1:
        raise MaskError(f"mask {name!r} must lie in [0, 1]; found {min(row):g} to {max(row):g}")
    return row


@dataclass(frozen=True)
class Plan:
    """The kept indices of every group of a model."""

    __pydantic_config__ = STRICT

    family: str
    """The `model_type` it was made for."""
    sizes: Mapping[str, int]
    """Units of every group before the plan is carried out."""
    keep: Mapping[str, tuple[int, ...]]
    """Kept indices of every group, ascending; empty for a removed block and its units."""
    scale: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Factors in (0, 1] of the kept units, for the groups where one is not 1; folded into the weights."""

    @classmethod
    def from_masks(cls, masks: _Masks) -> Self:
        """Make the plan of masks attached to a model: a mask of 0 removes, a fractional one scales.

        :raises PlanError: when every hidden dimension is masked.
        """
        return cls.from_values(masks.structure, dict(masks.items()))

    @classmethod
    def from_values(cls, structure: Structure, values: Mapping[str, Tensor]) -> Self:
        """Make a plan from one value in [0, 1] per unit.

        :param values: by group name, tensors [units]; all units of other groups stay.
        :raises MaskError: for a value outside of [0, 1].
        """
        rows = {name: check_mask(name, value, structure[name].size) for name, value in values.items()}
        keep: dict[str, tuple[int, ...]] = {}
        scale: dict[str, tuple[float, ...]] = {}
        for name, group in structure.items():
            row = rows.get(name, [1.0] * group.size)
            keep[name] = tuple(index for index, value in enumerate(row) if value > 0)
            factors = tuple(row[index] for index in keep[name])
            if any(factor != 1 for factor in factors):
                scale[name] = factors
        for block in structure.without_units({name: len(indices) for name, indices in keep.items()}):
            for member in (block.gate, block.inner):
                if member is not None:
                    keep[member] = ()
                    scale.pop(member, None)
        if "hidden" in keep and not keep["hidden"]:
            raise PlanError("every hidden dimension is masked; at least one must stay")
        return cls(structure.family, dict(structure.sizes), keep, scale)

    @property
    def kept(self) -> dict[str, int]:
        """Number of kept units of every group."""
        return {name: len(indices) for name, indices in self.keep.items()}

    def values(self, name: str) -> list[float]:
        """Return the mask of a group: a value in [0, 1] for each of its units."""
        row = [0.0] * self.sizes[name]
        factors = self.scale.get(name, (1.0,) * len(self.keep[name]))
        for index, factor in zip(self.keep[name], factors, strict=True):
            row[index] = factor
        return row

    def check(self, structure: Structure) -> None:
        """Check that the plan belongs to a model of this structure.

        :raises PlanError: naming the first difference.
        """
        if self.family != structure.family:
            raise PlanError(f"this plan is for a {self.family!r} model, the model is {structure.family!r}")
        for name, size in structure.sizes.items():
            if name not in self.sizes:
                raise PlanError(f"the plan has no group {name!r}, which the model has; it was made for another model")
            if self.sizes[name] != size:
                raise PlanError(f"group {name!r} has {self.sizes[name]} units in the plan and {size} in the model")
        extra = [name for name in self.sizes if name not in structure]
        if extra:
            raise PlanError(f"the plan names the group {extra[0]!r}, which the model does not have")
        self._check_values("the plan")
        for block in structure.without_units(self.kept):
            for member in (block.gate, block.inner):
                if member is not None and self.keep[member]:
                    raise PlanError(f"the plan keeps units of {member!r}, a part of a block that it removes")

    def _check_values(self, what: str) -> None:
        """Check what holds for the plan of any model: kept indices and factors in their ranges, for every group.

        :param what: the plan's name in messages.
        :raises PlanError: naming the first group that is at fault.
        """
        for name in {**self.sizes, **self.keep, **self.scale}:
            if name not in self.sizes or name not in self.keep:
                raise PlanError(f"{what} has no {'sizes' if name in self.keep else 'kept indices'} of group {name!r}")
        for name, indices in self.keep.items():
            size = self.sizes[name]
            if size < 1:
                raise PlanError(f"{what} says that group {name!r} has {size} units")
            if list(indices) != sorted(set(indices)) or any(not 0 <= index < size for index in indices):
                raise PlanError(f"{what} keeps indices of {name!r} that do not ascend within 0..{size - 1}: {indices}")
        for name, factors in self.scale.items():
            if len(factors) != len(self.keep[name]) or not all(0 < factor <= 1 for factor in factors):
                raise PlanError(f"{what} must scale each kept unit of {name!r} by a factor in (0, 1]: {factors}")
        if self.keep.get("hidden", (0,)) == ():
            raise PlanError(f"{what} removes every hidden dimension; at least one must stay")

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, as `save` writes them."""
        return {
            "format_version": _FORMAT_VERSION,
            "family": self.family,
            "sizes": dict(self.sizes),
            "keep": {name: list(indices) for name, indices in self.keep.items()},
            "scale": {name: list(factors) for name, factors in self.scale.items()},
        }

    @property
    def hard(self) -> Plan:
        """The same plan without scales."""
        return Plan(self.family, self.sizes, self.keep)

    def then(self, later: Plan) -> Plan:
        """Return the plan that does the same as this one followed by a plan for the smaller model.

        :param later: its scales are kept; those of this plan were folded in.
        :raises PlanError: when it is for another model.
        """
        left = {name: size for name, size in self.kept.items() if size}  # a removed block has no groups any more
        if later.family != self.family or later.sizes != left:
            raise PlanError("the second plan is not for what the first one leaves")
        keep = {name: tuple(self.keep[name][index] for index in later.keep.get(name, ())) for name in self.keep}
        return Plan(self.family, self.sizes, keep, later.scale)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan written by `save`.

        :raises PlanError: when the file is missing, is not a plan, or comes from a newer version.
        """
        return cls.from_dict(read_json(Path(path), PlanError, f"{path} is not a readable plan"), str(path))

    @classmethod
    def from_dict(cls, payload: Mapping[str, Any], path: str = "the plan") -> Self:
        """Make a plan from the values of `to_dict`.

        :param path: its name in error messages.
        :raises PlanError: when it is no plan, or comes from a newer version.
        """
        entries = dict(payload) if isinstance(payload, Mapping) else {}
        check_format(entries.pop("format_version", None), _FORMAT_VERSION, PlanError, f"{path} is not a readable plan")
        if "scale" not in entries:  # has a default for plans that are made in Python
            raise PlanError(f"{path} is not a readable plan: scale: Field required")
        plan = validated(cls, entries, PlanError, f"{path} is not a readable plan")
        plan._check_values(path)
        return plan

    def __repr__(self) -> str:
        return f"Plan({self.family}: {counted(self.sizes, self.kept)})"

    def _repr_html_(self) -> str:
        return structure_map(self.sizes, self.kept, self.keep)._repr_html_()

    def __str__(self) -> str:
        lines = [f"Plan for a {self.family} model"]
        for name, size in self.sizes.items():
            kind = name.rpartition(".")[2]
            if kind in ("hidden", "heads", "intermediate"):
                kept = len(self.keep[name])
                lines.append(f"  {name:<24} {f'{kept:>5} of {size}' if kept else 'block removed'}")
        return "\n".join(lines)

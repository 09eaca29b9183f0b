"""How messages speak of a parameter: by its name, and by what its description says of each dimension."""

from __future__ import annotations

from collections.abc import Sequence

from cofiprune.structure import Parameter, Side


def module_of(spec: Parameter) -> str:
    """Path of the module whose row describes a parameter."""
    return (spec.described_as or spec.name).rpartition(".")[0]


def role_of(spec: Parameter, group: str) -> str | None:
    """What the mask of a group does to a parameter; None when it has no axis of the group."""
    return next((side.role for side in spec.sides if side is not None and side.group == group), None)


def described(specs: Sequence[Parameter]) -> str:
    """Parameters, each with its axes."""
    return " and ".join(f"{spec.name!r} ({layout(spec)})" for spec in specs)


def layout(spec: Parameter) -> str:
    """The axes of a parameter, dimension by dimension."""
    return "; ".join(
        f"dimension {dim}, {length} long: {'no axis' if side is None else _side(side)}"
        for dim, (length, side) in enumerate(zip(spec.shape, spec.sides, strict=True))
    )


def _side(side: Side) -> str:
    return f"{side.group} as copies {side.copies} x units {side.units} x block {side.block}, {side.role}"

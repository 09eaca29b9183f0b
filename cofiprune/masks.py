"""Masks over the groups of a model: a mapping from group name to a 1-D tensor.

A registry is in one of two states. *Set*: the values were assigned, their zeros are known on the host, and removed
units are not computed. *Bound*: for one training step the values are a differentiable sample of the gates; nothing
depends on their zeros on the host, so that it need not wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from cofiprune import accounting
from cofiprune.errors import MaskError, StructureError, UnknownGroupError
from cofiprune.plan import Plan, check_mask
from cofiprune.structure import Structure


@dataclass(frozen=True)
class Reading:
    """A mask in the form that masked modules need."""

    value: Tensor
    """[units]"""
    ones: bool
    """Every value is 1. Always False while bound."""
    index: Tensor | None
    """Indices of the kept units when some are removed; None when all are kept, or while bound."""
    empty: bool
    """Every value is 0. Always False while bound."""
    bound: bool
    seen: Tensor | None = None
    """The values that were read, on a CPU; None while bound."""


class MaskRegistry(MutableMapping[str, Tensor]):
    """The masks attached to a model; a mapping from group name to a tensor [units] with values in [0, 1].

    Also a context manager that detaches on leaving.
    """

    def __init__(self, structure: Structure, names: Sequence[str], *, device: torch.device, dtype: torch.dtype) -> None:
        self.structure = structure
        with torch.inference_mode(False):  # they must serve training that comes later
            self._values = {name: torch.ones(structure[name].size, device=device, dtype=dtype) for name in names}
        self._readings: dict[str, tuple[int, Reading]] = {}
        self._bound: dict[str, Reading] = {}
        self._bound_alive: dict[str, Tensor] = {}
        self._blocks = {block.gate: block for block in structure.blocks}
        self.on_detach: list[Callable[[], None]] = []
        self.kept_elsewhere = False
        """Whoever saves the model saves its masks too, so that saving it alone needs no warning."""

    def __getitem__(self, name: str) -> Tensor:
        self._known(name)
        return self._values[name]

    def __setitem__(self, name: str, value: Tensor | Sequence[float]) -> None:
        self._known(name)
        target = self._values[name]
        try:
            row = torch.as_tensor(value, dtype=target.dtype).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise MaskError(f"mask {name!r} takes {len(target)} numbers in [0, 1], not {value!r}") from error
        self._check_values(name, row)
        if target.shape != row.shape:
            raise MaskError(f"mask {name!r} was given the shape {tuple(target.shape)}; detach the masks, attach anew")
        with torch.no_grad():
            target.copy_(row)

    def __delitem__(self, name: str) -> None:
        raise MaskError("a mask cannot be deleted; set it to ones, or detach the registry")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getstate__(self) -> dict[str, Any]:
        # A copy runs under the set values: what is bound belongs to one step of the original, and readings go by the
        # changes that its tensors have counted.
        return {**self.__dict__, "_readings": {}, "_bound": {}, "_bound_alive": {}}

    def __repr__(self) -> str:
        lines = [f"MaskRegistry of a {self.structure.family} model, sparsity {self.sparsity():.4f}"]
        for name, value in self._values.items():
            lines.append(f"  {name:<24} {int((value > 0).sum())} of {len(value)} kept")
        return "\n".join(lines)

    def _known(self, name: str) -> None:
        if name not in self._values:
            group = self.structure[name]
            raise UnknownGroupError(f"no mask is attached for {name!r}; attach with units that include {group.unit!r}")

    def set_plan(self, plan: Plan) -> None:
        """Set every attached mask to what a plan keeps.

        :raises PlanError: when the plan is for another model.
        :raises StructureError: when it removes units whose masks are not attached.
        """
        plan.check(self.structure)
        for name in plan.keep:
            if name in self._values:
                self[name] = plan.values(name)
        if Plan.from_masks(self).keep != dict(plan.keep):
            raise StructureError("the plan removes units of a kind whose masks are not attached; attach all units")

    def plan(self) -> Plan:
        """Return the plan of these masks."""
        return Plan.from_masks(self)

    def sparsity(self) -> float:
        """Return the removed share of the parameters of the encoder's layers, exactly as `compact` would remove it."""
        return accounting.sparsity(accounting.layer_parameters(self.structure), self.structure, self.plan().kept)

    def model_sparsity(self) -> float:
        """Return the removed share of every parameter of the model."""
        return accounting.sparsity(accounting.model_parameters(self.structure), self.structure, self.plan().kept)

    def detach(self) -> None:
        """Take the masks off, which gives the stock model back; a second call does nothing."""
        while self.on_detach:
            self.on_detach.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def bind(self, values: Mapping[str, Tensor]) -> None:
        """Run under differentiable values until `unbind`.

        :param values: by group name, tensors [units] with values in [0, 1], on the model's device; other groups keep
            their set values.
        """
        self._bound = {name: Reading(value, False, None, False, True) for name, value in values.items()}
        self._bound_alive = {
            gate: torch.stack([(reading.value > 0).any() for reading in readings]).all()
            for gate in self._blocks
            if (readings := self._of_block(gate))
        }

    def unbind(self) -> None:
        """Run under the set values again."""
        self._bound, self._bound_alive = {}, {}

    def read(self, name: str) -> Reading | None:
        """Return the current reading of a group; None when it has no mask."""
        if name in self._bound:
            return self._bound[name]
        value = self._values.get(name)
        if value is None:
            return None
        version, reading = self._readings.get(name, (-1, None))
        if reading is None or version != value._version or _written_over(value, reading.seen):
            reading = self._measure(name, value)
            self._readings[name] = (value._version, reading)
        return reading

    def alive(self, gate: str) -> bool | Tensor:
        """Return whether a block is there: a bool for set values, a scalar bool tensor while bound."""
        if gate in self._bound_alive:
            return self._bound_alive[gate]
        return not any(reading.empty for reading in self._of_block(gate))

    def _of_block(self, gate: str) -> list[Reading]:
        """The readings of a block's gate and of its inner units, as far as they have masks."""
        block = self._blocks[gate]
        readings = (self.read(name) for name in (block.gate, block.inner) if name is not None)
        return [reading for reading in readings if reading is not None]

    def _measure(self, name: str, value: Tensor) -> Reading:
        # A reading taken under inference_mode must serve the training that comes after it.
        with torch.inference_mode(False):
            row = value.detach().cpu()
            self._check_values(name, row)
            kept = row > 0
            index = None if bool(kept.all()) else kept.nonzero().flatten().to(value.device)
            seen = row.clone() if value.device.type == "cpu" else None
        return Reading(value, bool((row == 1).all()), index, not bool(kept.any()), False, seen)

    def _check_values(self, name: str, row: Tensor) -> None:
        check_mask(name, row, self.structure[name].size)
        if name == "hidden" and not bool((row > 0).any()):
            raise MaskError("mask 'hidden' would remove every hidden dimension; at least one must stay")


def _written_over(value: Tensor, seen: Tensor | None) -> bool:
    """Return whether values are others than were read, although torch counted no change: by `.data` or NumPy.

    To look would make other devices wait, and compiled code.
    """
    return seen is not None and not torch.compiler.is_compiling() and not torch.equal(value, seen)

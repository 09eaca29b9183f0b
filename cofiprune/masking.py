"""Running a stock model under masks, without touching its parameters.

Masks multiply *weights* where they can: a block's last projection carries the masks of its inner units, of the hidden
dimensions it writes and of its own gate, at the cost of a product of the size of the weight instead of the
activations. Embedding lookups are scaled at their output, norms take their statistics over the kept dimensions, and a
removed block returns its input. Each masked module gets an instance attribute `forward`; parameters, names and state
dict stay as they are.

Shapes: B batch, T tokens, H hidden, n kept hidden dimensions.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofiprune.adapter import structure as structure_of
from cofiprune.bypass import attends, bypass, entry_of, left_of
from cofiprune.errors import MaskError, names_checked
from cofiprune.masks import MaskRegistry
from cofiprune.refusals import refuse_computed
from cofiprune.structure import Block, BlockExit, Parameter, Side, Structure
from cofiprune.whole import inside

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTRIBUTE = "_cofiprune_masks"


@names_checked
def attach(model: PreTrainedModel, units: str | Sequence[str] | None = None) -> MaskRegistry:
    """Attach masks of ones to a model, which then runs under the masks' values.

    :param units: kinds of units to mask, any of "layer", "head", "intermediate", "hidden"; None for all.
    :raises AdapterError: when the model's family has no adapter.
    :raises StructureError: for a unit kind that the model cannot prune.
    :raises MaskError: when masks are attached already.
    """
    model = inside(model)
    return attach_to(model, structure_of(model), units)


def attach_to(model: PreTrainedModel, structure: Structure, units: str | Sequence[str] | None = None) -> MaskRegistry:
    """Attach masks of ones to a model whose structure is known; the rest is as in `attach`."""
    if masks_of(model) is not None:
        raise MaskError("masks are attached to this model already; call masks.detach() first")
    names = [group.name for group in structure.select(units)]
    weight = next(model.parameters())
    dtype = torch.promote_types(torch.float32, weight.dtype)
    masks = MaskRegistry(structure, names, device=weight.device, dtype=dtype)
    sites = [*_sites(model, structure, masks), _Saved(model, masks)]
    for site in sites:
        site.install()
    # Plain attribute of the instance: not a parameter, buffer or submodule, so nothing of it is saved.
    model.__dict__[_ATTRIBUTE] = masks
    # Bound to objects, so that a deep copy of the model is detached by the deep copy of its masks.
    masks.on_detach += [partial(_forget, model), *(site.remove for site in sites)]
    return masks


def masks_of(model: nn.Module) -> MaskRegistry | None:
    """Return the masks attached to a model, or None."""
    masks: MaskRegistry | None = model.__dict__.get(_ATTRIBUTE)
    return masks


def _forget(model: nn.Module) -> None:
    model.__dict__.pop(_ATTRIBUTE, None)


class _Site:
    """A module with another method in the place of its own `method`, which is `stock`: its forward, under masks."""

    method = "forward"

    def __init__(self, module: nn.Module, masks: MaskRegistry) -> None:
        self.module = module
        self.masks = masks
        self.shadowed: Callable[..., Any] | None = None
        self._find_stock()

    def _find_stock(self) -> None:
        self.stock = self.shadowed or MethodType(getattr(type(self.module), self.method), self.module)

    def __getstate__(self) -> dict[str, Any]:
        # A bound method is pickled by its name, which would lead back here.
        return {name: value for name, value in self.__dict__.items() if name != "stock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._find_stock()

    def install(self) -> None:
        self.shadowed = self.module.__dict__.get(self.method)
        self._find_stock()
        self.module.__dict__[self.method] = self.forward

    def remove(self) -> None:
        if self.shadowed is not None:
            self.module.__dict__[self.method] = self.shadowed
        else:
            self.module.__dict__.pop(self.method, None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class _Saved(_Site):
    """The model itself: its `save_pretrained` says that it writes no masks."""

    method = "save_pretrained"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.masks.kept_elsewhere and not all(bool((value == 1).all()) for value in self.masks.values()):
            warnings.warn(
                "save_pretrained writes every weight of this model and not the masks that are attached to it: what is "
                "loaded again runs without them. Save cofiprune.compact(model), which is what they leave, or "
                "masks.plan().save(path) beside the weights.",
                stacklevel=2,
            )
        return self.stock(*args, **kwargs)


class _Weights(_Site):
    """A module whose parameters are multiplied by masks along their sides."""

    def __init__(self, module: nn.Module, masks: MaskRegistry, parameters: dict[str, Parameter]) -> None:
        super().__init__(module, masks)
        self.parameters = parameters

    def masked(self) -> dict[str, Tensor]:
        """Return the masked values of the parameters that any mask changes, by local name."""
        found = {}
        for name, spec in self.parameters.items():
            if name not in self.module._parameters:  # a parametrisation was put on after the masks
                refuse_computed(self.module, spec.name.rpartition(".")[0], name)
            value = self.module._parameters[name]
            if value is None:
                continue
            new: Tensor = value
            for dim, side in spec.prunable.items():
                factor = self._factor(side, new)
                if factor is not None:
                    new = new * factor.view(-1, *[1] * (new.dim() - dim - 1))
            gate = self.masks.read(spec.gate) if spec.gate and spec.gated else None
            if gate is not None and not gate.ones:
                new = new * gate.value.to(new.dtype)
            if new is not value:
                found[name] = new
        return found

    def _factor(self, side: Side, like: Tensor) -> Tensor | None:
        reading = None if side.role == "slice" else self.masks.read(side.group)
        if reading is None or reading.ones:
            return None
        value = reading.value if side.role == "scale" else (reading.value > 0)
        value = value.to(like.dtype)
        if side.block > 1:
            value = value.repeat_interleave(side.block)
        return value.repeat(side.copies) if side.copies > 1 else value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        values = self.masked()
        if not values:
            return self.stock(*args, **kwargs)
        if type(self.module) is nn.Linear and self.shadowed is None:
            bias = values.get("bias", self.module.bias)
            return F.linear(args[0], values.get("weight", self.module.weight), bias)
        with _swapped(self.module, values):
            return self.stock(*args, **kwargs)


class _Reader(_Site):
    """A module that reads the weights of modules which it does not call."""

    def __init__(self, module: nn.Module, masks: MaskRegistry, holders: list[_Weights]) -> None:
        super().__init__(module, masks)
        self.holders = holders

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as swaps:
            for holder in self.holders:
                if values := holder.masked():
                    swaps.enter_context(_swapped(holder.module, values))
            return self.stock(*args, **kwargs)


class _Lookup(_Site):
    """An embedding table: its output [B, T, H] is scaled, which is cheaper than scaling the table."""

    def __init__(self, module: nn.Module, masks: MaskRegistry, group: str) -> None:
        super().__init__(module, masks)
        self.group = group

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.stock(*args, **kwargs)
        reading = self.masks.read(self.group)
        return output if reading is None or reading.ones else output * reading.value.to(output.dtype)


class _Norm(_Site):
    """A norm over the hidden dimension: statistics over the kept dimensions, output scaled by the mask."""

    def __init__(self, module: nn.Module, masks: MaskRegistry, kind: str, gate: str | None) -> None:
        """Prepare a norm.

        :param gate: the gate that multiplies it, where it is the last of its block.
        """
        super().__init__(module, masks)
        self.kind = kind
        self.gate = gate

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self.masks.read("hidden")
        if hidden is None or hidden.ones:
            output = self.stock(*args, **kwargs)
        elif hidden.bound:
            output = self._weighted(args[0], hidden.value)
        else:
            output = self._gathered(args[0], hidden.value, hidden.index)
        gate = self.masks.read(self.gate) if self.gate else None
        return output if gate is None or gate.ones else output * gate.value.to(output.dtype)

    def _gathered(self, states: Tensor, mask: Tensor, index: Tensor | None) -> Tensor:
        """The stock norm on the kept columns, exactly as the compacted model will run it."""
        small = copy.copy(self.module)
        small.__dict__ = {name: value for name, value in self.module.__dict__.items() if name != "forward"}
        kept = slice(None) if index is None else index
        small.__dict__["_parameters"] = {
            name: None if value is None else value[kept] * mask[kept].to(value.dtype)
            for name, value in self.module._parameters.items()
        }
        if hasattr(small, "normalized_shape"):
            small.__dict__["normalized_shape"] = (len(mask[kept]),)
        output: Tensor = type(small).forward(small, states[..., kept])
        if index is None:
            return output
        return output.new_zeros(*states.shape[:-1], len(mask)).index_copy(-1, index, output)

    def _weighted(self, states: Tensor, mask: Tensor) -> Tensor:
        """The same, differentiable in the mask, and without reading its values on the host."""
        wide = states.to(torch.promote_types(torch.float32, states.dtype))
        share = (mask > 0).to(wide.dtype)
        share = share / share.sum()
        if self.kind == "layer":
            wide = wide - (wide @ share).unsqueeze(-1)
        epsilon = next(getattr(self.module, name) for name in _EPSILONS if hasattr(self.module, name))
        output = wide * torch.rsqrt((wide * wide) @ share + epsilon).unsqueeze(-1)
        weight, bias = (self.module._parameters.get(name) for name in ("weight", "bias"))
        output = output * (mask if weight is None else weight * mask).to(wide.dtype)
        if bias is not None:
            output = output + (bias * mask).to(wide.dtype)
        return output if weight is None else output.to(weight.dtype)


_EPSILONS = ("eps", "variance_epsilon", "epsilon")


class _Exit(_Site):
    """The exit of a block, or a module inside it; both return their input or zeros when the block is removed."""

    def __init__(self, module: nn.Module, masks: MaskRegistry, block: Block, exit: BlockExit) -> None:
        super().__init__(module, masks)
        self.gate = block.gate
        self.exit = exit
        self.inside = exit is not block.exit
        self.attends = attends(block, exit)
        self.shared = tuple(shared for shared in block.shared if shared.module == exit.module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        alive = self.masks.alive(self.gate)
        if alive is True:
            return self.stock(*args, **kwargs)
        if alive is False:
            return bypass(self.exit, args, kwargs, self.shared, self.module, attends=self.attends)
        output = self.stock(*args, **kwargs)
        outputs = output if isinstance(output, tuple) else (output,)
        # Zeros of the output's shape: a projection reads inner units and writes hidden dimensions.
        residual = self.exit.residual
        entry = entry_of(self.exit, args, kwargs) if residual else torch.zeros_like(outputs[0])
        if self.inside and outputs[0].shape != entry.shape:
            return output  # the exit drops it
        entries = [entry, *(left_of(self.exit, args[at]) for at in self.exit.carried)]
        chosen = [
            one if other is None else torch.where(alive, one, other)
            for one, other in zip(outputs, entries, strict=False)
        ]
        return (*chosen, *outputs[len(chosen) :]) if isinstance(output, tuple) else chosen[0]


@contextmanager
def _swapped(module: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    stock = module._parameters
    # Straight into the instance's dict: these are tensors for one call, not parameters to register.
    module.__dict__["_parameters"] = {**stock, **values}
    try:
        yield
    finally:
        module.__dict__["_parameters"] = stock


def _sites(model: nn.Module, structure: Structure, masks: MaskRegistry) -> Iterator[_Site]:
    modules = dict(model.named_modules())
    norms = {norm.module: norm for norm in structure.norms}
    owned: defaultdict[str, dict[str, Parameter]] = defaultdict(dict)
    readers: defaultdict[str, list[_Weights]] = defaultdict(list)
    for spec in structure.parameters:
        if spec.gated or any(side.role != "slice" for side in spec.prunable.values()):
            path, _, name = (spec.described_as or spec.name).rpartition(".")
            owned[path][name] = spec
    for path, parameters in owned.items():
        reader = next(iter(parameters.values())).read_in
        if reader is not None:
            readers[reader].append(_Weights(modules[path], masks, parameters))
        elif path not in norms:
            yield _weights(modules[path], masks, parameters)
    for path, holders in readers.items():
        yield _Reader(modules[path], masks, holders)
    for norm in structure.norms:
        gates = {spec.gate for spec in owned[norm.module].values() if spec.gated}
        yield _Norm(modules[norm.module], masks, norm.kind, next(iter(gates), None))
    for block in structure.blocks:
        for exit in (*block.bypassed, block.exit):
            yield _Exit(modules[exit.module], masks, block, exit)


def _weights(module: nn.Module, masks: MaskRegistry, parameters: dict[str, Parameter]) -> _Site:
    if isinstance(module, nn.Embedding):
        side = parameters["weight"].sides[1]
        if side is not None and side.role == "scale":
            return _Lookup(module, masks, side.group)
    return _Weights(module, masks, parameters)

"""What a compacted model has that its dense one has not: smaller tensors, placeholders of removed blocks, and hooks.

All of it belongs to the model, which is saved, loaded and trained with it. `cut` does it by a table of plain values, as
`slicing.table` makes one. The code here goes word for word into the file by which a folder loads without this package
(see `modelling`), also with older releases of transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cofiprune.bypass import bypass, shared_input
from cofiprune.compaction.places import narrow_to

KINDS = ("shapes", "attributes", "removed", "dropped", "picked", "narrowed")
Table = Mapping[str, Mapping[str, Any]]
"""Rows of these kinds, by the names of parameters and modules."""


class Passthrough(nn.Module):
    """Replaces a module of a removed block, and returns its input or zeros."""

    marker = ""
    """Name of the matrix that is kept one element of; "" for none."""

    def __init__(self, replaced: nn.Module | None, row: Mapping[str, Any]) -> None:
        """Take over what is still needed of a module.

        :param replaced: None for one that was inside another replaced module.
        """
        super().__init__()
        self.exit: Any = SimpleNamespace(**row)
        self.shared: Any = tuple(placed(each, replaced) for each in row["shared"])
        self.replaced_type = type(replaced)
        tables = {each.table for each in self.shared if each.table and hasattr(replaced, each.table)}
        # In a tuple, so that the replaced module is no submodule; of its own, only the tables of shared tensors stay.
        self.maker = (replaced,) if tables else ()
        for name, child in [] if replaced is None else list(replaced.named_children()):
            if name in tables:
                self.add_module(name, child)
            elif isinstance(child, nn.ModuleDict):
                # A model may ask for its keys (names of languages, say) without running the layer.
                self.add_module(name, nn.ModuleDict({key: nn.Module() for key in child}))
            if tables and name not in tables:
                delattr(replaced, name)

    def mark(self, name: str, like: Tensor) -> None:
        """Keep one element under the name of a removed matrix.

        A removed block leaves no shape by which a loader could notice it, and transformers would quietly initialise
        its weights anew. Under this name the shape is wrong, so that loading without cofiprune fails.
        """
        self.marker = name
        *path, name = name.split(".")
        owner: nn.Module = self
        for part in path:
            owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_buffer(name, torch.zeros(1, dtype=like.dtype, device=like.device))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or convert; the marker is 0 too where that only lays out memory (`to_empty`)."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        marker = self.get_buffer(self.marker) if self.marker else None
        if marker is not None and not marker.is_meta and not marker.is_inference():
            marker.zero_()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return bypass(self.exit, args, kwargs, self.shared, *self.maker, attends=self.exit.attends)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """List what still learns, and the marker, as if a module here held it under its dotted name.

        Neither a module in the place of a projection nor the marker's own is a layer that others could replace by its
        name (PEFT).
        """
        if "." in self.marker:
            listed = nn.Module()
            listed._buffers[self.marker] = self.get_buffer(self.marker)
            yield prefix, listed
        for name, child in self.named_children():
            if next(child.parameters(), None) is not None:
                yield from child.named_modules(memo, f"{prefix}.{name}".lstrip("."), remove_duplicate)

    def __getattr__(self, name: str) -> Any:
        """Give the methods of the replaced module, which do nothing: some models call them to switch settings."""
        if not name.startswith("_") and callable(getattr(self.__dict__.get("replaced_type"), name, None)):
            return nothing
        return super().__getattr__(name)


def nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing, in place of a removed module's method."""


def placed(row: Mapping[str, Any], module: nn.Module | None) -> Any:
    """Return a shared tensor's row with its place among a module's arguments, which differs between releases."""
    names = [] if module is None else list(inspect.signature(module.forward).parameters)
    return SimpleNamespace(**{**row, **({"argument": names.index(row["keyword"])} if row["keyword"] in names else {})})


class Pick:
    """Hooks that slice a tensor shared by all layers to the units that a compacted module has kept.

    The module passes the whole tensor on to the next layer. The kept units are a buffer of the module, [units kept], so
    that they are saved and moved with the model.
    """

    BUFFER = "kept_units"

    def __init__(self, shared: Any) -> None:
        self.shared = shared
        self.whole: Tensor | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replace the tensor in the arguments."""
        place, name = self.shared.argument, self.shared.keyword
        self.whole = shared_input(self.shared, args, kwargs, module)
        if self.whole is None:
            return args, kwargs
        picked = self.whole.index_select(self.shared.dim, module.get_buffer(self.BUFFER))
        if len(args) > place:
            return (*args[:place], picked, *args[place + 1 :]), kwargs
        return args, {**kwargs, name: picked}

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Replace it in the outputs."""
        whole, self.whole, place = self.whole, None, self.shared.output
        return output if place is None else (*output[:place], whole, *output[place + 1 :])


def pick(module: nn.Module, shared: Any, index: Tensor) -> None:
    """Make a module slice a shared tensor; `index` counts in the units that it has now."""
    index = index.to(next(module.parameters()).device)
    before = module._buffers.get(Pick.BUFFER)
    if before is not None:
        module._buffers[Pick.BUFFER] = before[index]
        return
    pick = Pick(shared)
    module.register_forward_pre_hook(pick.before, with_kwargs=True)
    module.register_forward_hook(pick.after)
    module.register_buffer(Pick.BUFFER, index)


def cut(model: nn.Module, table: Table, keep: Mapping[str, Tensor] | None = None) -> None:
    """Give a model the sizes that a table states, in place; of its values, the first ones stay.

    :param keep: the units of shared tensors that stay, by module; the first ones where a file has them.
    """
    parameters = dict(model.named_parameters())
    for name, row in table["removed"].items():
        replaced = module_at(model, name)
        placeholder = Passthrough(replaced, row)
        if row["mark"]:
            placeholder.mark(row["mark"], parameters[f"{name}.{row['mark']}"])
        model.set_submodule(name, placeholder)
    for name in table["dropped"]:
        drop(model, name)
    shrink(model, {name: parameters[name] for name in table["shapes"] if name in parameters}, table["shapes"])
    for name, attributes in table["attributes"].items():
        if (module := module_at(model, name)) is not None:
            for key, value in attributes.items():
                setattr(module, key, value)
    for name, row in table["picked"].items():
        index = torch.arange(row["units"]) if keep is None else keep[name]
        module = model.get_submodule(name)
        pick(module, placed(row, module), index)
    for name, row in table["narrowed"].items():
        narrow_to(model, name, row)


def shrink(model: nn.Module, parameters: Mapping[str, nn.Parameter], shapes: Mapping[str, Any]) -> None:
    """Cut parameters to shapes, in which None stands for all that there is, wherever a model has them."""
    smaller: dict[int, nn.Parameter] = {}
    for name, value in parameters.items():
        if any(new not in (None, old) for new, old in zip(shapes[name], value.shape, strict=True)):
            first = value.detach()[tuple(slice(new) for new in shapes[name])].clone()
            smaller[id(value)] = nn.Parameter(first, requires_grad=value.requires_grad)
    for module in model.modules():  # a tied parameter is in several of them
        for name, found in module._parameters.items():
            if found is not None and id(found) in smaller:
                module._parameters[name] = smaller[id(found)]
        follow_shape(module)


def drop(model: nn.Module, path: str) -> None:
    """Put a single 0 in the place of a parameter that a layer holds, and None in the place of a module.

    The 0 is a tensor, and saved: transformers initialises a layer's parameters by name when it loads a model.
    """
    owner, _, name = path.rpartition(".")
    holder = model.get_submodule(owner)
    value = holder._parameters.get(name)
    if value is not None:
        del holder._parameters[name]
        holder.register_buffer(name, torch.zeros(1, dtype=value.dtype, device=value.device))
    elif name in holder._modules:
        holder._modules[name] = None


def follow_shape(module: nn.Module) -> None:
    """Set the size attributes of torch's own modules, and of transformers' `Conv1D`, from their weight."""
    weight = module._parameters.get("weight")
    if weight is None:
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, Conv1D):
        module.nx, module.nf = weight.shape
    elif isinstance(module, nn.Conv1d | nn.Conv2d):
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups


def module_at(model: nn.Module, path: str) -> nn.Module | None:
    """Return a module of a model; None where another class of the family has none there."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None

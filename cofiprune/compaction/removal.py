"""Placeholders for removed blocks, and hooks that slice shared inputs to the kept units.

Both belong to a compacted model, which is saved, loaded and trained with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cofiprune.bypass import attends, bypass, shared_input
from cofiprune.structure import Block, BlockExit, Shared, Structure


class Passthrough(nn.Module):
    """Replaces a module of a removed block, and returns its input or zeros."""

    def __init__(self, block: Block, exit: BlockExit, replaced: nn.Module | None) -> None:
        """Take over what is still needed of a module.

        :param replaced: None for one that was inside another replaced module.
        """
        super().__init__()
        shared = tuple(each for each in block.shared if each.module == exit.module)
        self.exit = exit
        self.attends = attends(block, exit)
        self.shared = shared
        self.replaced_type = type(replaced)
        tables = {each.table for each in shared if each.table and hasattr(replaced, each.table)}
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
        *path, name = name.split(".")
        owner: nn.Module = self
        for part in path:
            owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_buffer(name, torch.zeros(1, dtype=like.dtype, device=like.device))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return bypass(self.exit, args, kwargs, self.shared, *self.maker, attends=self.attends)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """List what still learns. Neither this nor a marker is a layer that others could replace by its name (PEFT)."""
        for name, child in self.named_children():
            if next(child.parameters(), None) is not None:
                yield from child.named_modules(memo, f"{prefix}.{name}".lstrip("."), remove_duplicate)

    def __getattr__(self, name: str) -> Any:
        """Give the methods of the replaced module, which do nothing: some models call them to switch settings."""
        if not name.startswith("_") and callable(getattr(self.__dict__.get("replaced_type"), name, None)):
            return _nothing
        return super().__getattr__(name)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing, in place of a removed module's method."""


class Pick:
    """Hooks that slice a tensor shared by all layers to the units that a compacted module has kept.

    The module passes the whole tensor on to the next layer. The kept units are a buffer of the module, [units kept], so
    that they are saved and moved with the model.
    """

    BUFFER = "kept_units"

    def __init__(self, shared: Shared) -> None:
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


def pick(module: nn.Module, shared: Shared, index: Tensor) -> None:
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


def remove_block(model: nn.Module, structure: Structure, block: Block) -> None:
    """Put placeholders in the place of a block's modules."""
    marked = False
    for exit in (block.exit, *block.bypassed):
        path = exit.module
        try:
            replaced = model.get_submodule(path)
        except AttributeError:  # it was inside a module that was replaced before
            replaced = None
        marker = None if marked else _matrix_inside(path, structure, block)
        like = None if marker is None else model.get_parameter(marker)
        placeholder = Passthrough(block, exit, replaced)
        if marker is not None and like is not None:
            placeholder.mark(marker.removeprefix(f"{path}."), like)
            marked = True
        model.set_submodule(path, placeholder)
    for path in block.dropped:
        _drop(model, path)


def _drop(model: nn.Module, path: str) -> None:
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


def _matrix_inside(path: str, structure: Structure, block: Block) -> str | None:
    """Name of a matrix of a block that lies in a module; its last projection if that does.

    Others may be stored joined into one (query, key and value, say), which a single element does not survive.
    """
    names = [
        (not spec.gated, spec.name)
        for spec in structure.parameters
        if spec.gate == block.gate and spec.name.startswith(f"{path}.") and len(spec.shape) > 1
    ]
    return min(names)[1] if names else None

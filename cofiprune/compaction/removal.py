"""What stands where a block was, or where a module is given tensors for units that are no longer there.

Both are modules and hooks of a compacted model, which is saved, loaded and trained with them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cofiprune.masking import bypass, given
from cofiprune.structure import Block, BlockExit, Shared, Structure


class Passthrough(nn.Module):
    """Stands where a removed block was and hands its input on.

    A block that is gone leaves no shape behind by which a loader could notice it, and transformers would
    quietly initialise its weights anew. So the stand-in for a block's exit keeps one element under the name
    of a matrix that was there: without cofiprune that name has the wrong shape, and loading fails.
    """

    def __init__(
        self,
        exit: BlockExit,
        marker: str | None = None,
        like: Tensor | None = None,
        shared: tuple[Shared, ...] = (),
        was: nn.Module | None = None,
        stands_for: type[nn.Module] = nn.Module,
    ) -> None:
        super().__init__()
        self.exit = exit
        self.stands_for = stands_for
        self.shared = shared
        # In a tuple, so that what was there is no submodule; of it, only the tables of what it shares stay.
        self.was = (was,) if any(each.table and hasattr(was, each.table) for each in shared) else ()
        for name, child in list(was.named_children()) if was is not None and self.was else ():
            if any(name == each.table for each in shared):
                self.add_module(name, child)
            else:
                delattr(was, name)
        if marker is not None and like is not None:
            *path, name = marker.split(".")
            owner: nn.Module = self
            for part in path:
                owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_buffer(name, torch.zeros(1, dtype=like.dtype, device=like.device))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return bypass(self.exit, args, kwargs, self.shared, *self.was)

    def __getattr__(self, name: str) -> Any:
        """A method that a model calls on the block, to switch it to another kind of attention, say, does nothing."""
        if not name.startswith("_") and callable(getattr(self.__dict__.get("stands_for"), name, None)):
            return _nothing
        return super().__getattr__(name)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What is left of a removed block's methods."""


class Pick:
    """Hooks of a compacted module: of a tensor shared by all layers it takes the entries of the units kept.

    What the module hands on to the next layer is the whole of it.

    Which ones these are is a buffer of the module, [units kept], so that it is saved and moved with the model.
    """

    BUFFER = "kept_units"

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.whole: Tensor | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replace the tensor among the arguments."""
        place, name = self.shared.argument, self.shared.keyword
        self.whole = given(self.shared, args, kwargs, module)
        if self.whole is None:
            return args, kwargs
        picked = self.whole.index_select(self.shared.dim, module.get_buffer(self.BUFFER))
        if len(args) > place:
            return (*args[:place], picked, *args[place + 1 :]), kwargs
        return args, {**kwargs, name: picked}

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Replace it among the outputs."""
        whole, self.whole, place = self.whole, None, self.shared.output
        return output if place is None else (*output[:place], whole, *output[place + 1 :])


def pick(module: nn.Module, shared: Shared, index: Tensor) -> None:
    """Make a module pick entries of a shared tensor; `index` counts in the units that it has now."""
    index = index.to(next(module.parameters()).device)
    before = module._buffers.get(Pick.BUFFER)
    if before is None:
        pick = Pick(shared)
        module.register_forward_pre_hook(pick.before, with_kwargs=True)
        module.register_forward_hook(pick.after)
        module.register_buffer(Pick.BUFFER, index)
    else:
        module._buffers[Pick.BUFFER] = before[index]


def remove_block(model: nn.Module, structure: Structure, block: Block) -> None:
    marked = False
    for exit in (block.exit, *block.bypassed):
        marker = None if marked else _matrix_inside(exit.module, structure, block)
        shared = tuple(each for each in block.shared if each.module == exit.module)
        was = model.get_submodule(exit.module) if shared else None
        kind = _kind_at(model, exit.module)
        if marker is None:
            stand_in = Passthrough(exit, shared=shared, was=was, stands_for=kind)
        else:
            name, like = marker.removeprefix(f"{exit.module}."), model.get_parameter(marker)
            stand_in = Passthrough(exit, name, like, shared, was, kind)
            marked = True
        for name, child in _children(model, exit.module):
            if isinstance(child, nn.ModuleDict) and not hasattr(stand_in, name):
                # Its keys may be asked for (as the names of languages, say) where the layer itself is not run.
                stand_in.add_module(name, nn.ModuleDict({key: nn.Module() for key in child}))
        model.set_submodule(exit.module, stand_in)
    for path in block.dropped:
        _drop(model, path)


def _drop(model: nn.Module, path: str) -> None:
    """Put a single 0 in the place of a parameter that a layer holds, and None in that of a module.

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


def _children(model: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """The modules directly inside another; none of one that has gone with what was around it."""
    try:
        return list(model.get_submodule(path).named_children())
    except AttributeError:
        return []


def _kind_at(model: nn.Module, path: str) -> type[nn.Module]:
    """The class of a module; that of any for one that has gone with what was around it."""
    try:
        return type(model.get_submodule(path))
    except AttributeError:
        return nn.Module


def _matrix_inside(path: str, structure: Structure, block: Block) -> str | None:
    """Name of a matrix of a block that lies in a module: its last projection if that does.

    Others may be stored joined into one (query, key and value, say), which a single element does not survive.
    """
    names = [
        (not spec.gated, spec.name)
        for spec in structure.parameters
        if spec.gate == block.gate and spec.name.startswith(f"{path}.") and len(spec.shape) > 1
    ]
    return min(names)[1] if names else None

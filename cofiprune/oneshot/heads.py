"""What comes after the last layer, refitted to what the layers give now.

Every `nn.Linear` that runs after the last layer, poolers and classifiers, is fitted in the order in which they run, so
that it puts out what the same map put out in the whole model. Tables that are tied to the embeddings stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from cofiprune.inference.siblings import is_linear
from cofiprune.oneshot.layerwise import Batch, valid_rows
from cofiprune.oneshot.regression import LeastSquares
from cofiprune.structure import Structure

_LARGEST = 4096
"""Outputs of a map up to which it is refitted: beyond lie vocabularies, whose statistics would take too much memory."""


def head_maps(model: nn.Module, structure: Structure, batch: Batch) -> list[str]:
    """Return the paths of the linear maps that run after the last layer, in the order in which they run.

    Only those that learn, and that share their weights with nothing else.
    """
    inside = tuple(f"{path}." for path in structure.layers)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    owners = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    order: list[str] = []
    above: list[bool] = []
    with ExitStack() as hooks:
        last = model.get_submodule(structure.layers[-1])
        hooks.callback(last.register_forward_hook(lambda *_: above.append(True)).remove)
        for path, module in model.named_modules():
            if not is_linear(module) or path.startswith(inside) or module.out_features > _LARGEST:
                continue
            alone = owners.count(owners[names.index(f"{path}.weight")]) == 1
            if alone and module.weight.requires_grad:

                def note(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
                    if above and path not in order:
                        order.append(path)

                hooks.callback(module.register_forward_hook(note).remove)
        with torch.no_grad():
            model(**batch)
    return order


def repair_head(reference: nn.Module, small: nn.Module, structure: Structure, batches: Sequence[Batch]) -> None:
    """Refit the maps of the small model's head in place, each on what the ones before it give now.

    :param structure: of the small model.
    :param batches: on the models' device.
    """
    paths = head_maps(small, structure, batches[0])
    targets = _outputs(reference, paths, batches)
    for path in paths:
        module = small.get_submodule(path)
        assert isinstance(module, nn.Linear)
        wanted = targets[path]
        if wanted and wanted[0][1].shape[-1] != module.out_features:
            continue  # it writes hidden dimensions, of which some are gone
        fit = LeastSquares(module.in_features, module.out_features)
        for index, (inputs, given) in enumerate(_outputs(small, [path], batches)[path]):
            missing = wanted[index][1].to(given) - given
            fit.add(valid_rows(inputs, batches[index]), valid_rows(missing, batches[index]))
        fit.correct(module)


def _outputs(
    model: nn.Module, paths: Sequence[str], batches: Sequence[Batch]
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Inputs and outputs of some maps, for each batch."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in paths}
    with ExitStack() as hooks, torch.no_grad():
        for path in paths:

            def note(module: nn.Module, args: Any, output: Tensor, path: str = path) -> None:
                found[path].append((args[0].clone(), output.clone()))

            hooks.callback(model.get_submodule(path).register_forward_hook(note).remove)
        for batch in batches:
            model(**batch)
    return found

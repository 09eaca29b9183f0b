"""The multiple that kept sizes should have on a device, found by timing matrix products of several sizes there.

Kernels take rows and columns in pieces. A size that is no whole number of them costs as much as the next one that is,
or more. How large the pieces are depends on the processor, the precision and the number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cofiprune.structure import Structure
from cofiprune.timing import in_turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CANDIDATES = (1, 8, 16, 32, 64)
_SIZES = (75, 109, 171, 235, 299, 365)
"""Sizes as pruning leaves them: multiples of none but the first candidate. Others are measured at the nearest."""
_WORTH = 0.02
"""Time per unit that a coarser multiple has to save: it leaves fewer sizes to choose among."""
_COARSE = 8
"""Multiples of up to so many parts of a block's units are considered."""
_SECONDS = 1.0


def best_multiple(model: PreTrainedModel, structure: Structure, *, rows: int) -> int:
    """Return the smallest multiple with which a unit takes about as little time as with any.

    :param rows: of the activations: batch size times length.
    """
    widest = max((group.size for group in structure.values() if group.kind == "intermediate"), default=1)
    width = structure["hidden"].size if "hidden" in structure else int(getattr(model.config, "hidden_size", widest))
    candidates = tuple(each for each in CANDIDATES if each == 1 or each * _COARSE <= widest)
    threads = torch.get_num_threads() if model.device.type == "cpu" else 0
    return _measured(model.device, model.dtype, threads, rows, width, candidates)


def cheapest(times: Mapping[int, float], candidates: Sequence[int]) -> int:
    """Return the smallest candidate whose sizes take about as little time per unit as those of any.

    :param times: seconds by size.
    """
    per_unit = {each: float(np.mean([times[size] / size for size in sizes_of(each)])) for each in candidates}
    least = min(per_unit.values())
    return min(each for each, value in per_unit.items() if value <= (1 + _WORTH) * least)


def sizes_of(multiple: int) -> list[int]:
    """The sizes at which a multiple is measured."""
    return [max(multiple, multiple * round(size / multiple)) for size in _SIZES]


@lru_cache(maxsize=64)
def _measured(
    device: torch.device, dtype: torch.dtype, threads: int, rows: int, width: int, candidates: tuple[int, ...]
) -> int:
    sizes = sorted({size for each in candidates for size in sizes_of(each)})
    with torch.inference_mode():
        states = torch.ones(rows, width, dtype=dtype, device=device)
        passes = []
        for size in sizes:
            weights = [torch.ones(shape, dtype=dtype, device=device) for shape in ((size, width), (width, size))]
            passes.append(partial(_there_and_back, states, *weights))
        seconds = in_turn(passes, device, seconds=_SECONDS, own_time=threads == 1)
    times = dict(zip(sizes, np.median(seconds, axis=1).tolist(), strict=True))
    return cheapest(times, candidates)


def _there_and_back(states: Tensor, into: Tensor, out_of: Tensor) -> Tensor:
    """A feed-forward block's two products: [rows, width] to [rows, size] and back."""
    return F.linear(F.linear(states, into), out_of)

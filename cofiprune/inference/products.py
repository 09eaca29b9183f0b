"""The product of a linear layer, by the faster of two libraries in torch.

torch multiplies float32 matrices on a CPU by MKL, which does not use all instructions of other makers' processors;
oneDNN does. The faster of the two is measured once in a process. Both read the weight in place: nothing is packed or
copied, so that no weight is ever out of date.

Shapes: R rows (examples times tokens), n inputs, m outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cofiprune.timing import in_turn

_LEAST_ROWS = 32
_LEAST_WORK = 2**20
"""Multiply-accumulates below which a call costs more than the product."""
_STEP = 32
_LARGE_WORK = 2**26
_GAIN = 1.1


def product(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `F.linear(states, weight, bias)`, within rounding; without gradients.

    :param states: [..., n].
    :param weight: [m, n]; `bias` [m] or None.
    :return: [..., m].
    """
    rows = states.numel() // (states.size(-1) or 1)
    work = rows * weight.numel()
    if rows < _LEAST_ROWS or work < _LEAST_WORK or not _eligible(states, weight) or not onednn_is_faster():
        return F.linear(states, weight, bias)
    short = -rows % _STEP
    if not short or work >= _LARGE_WORK:
        return _by_onednn(states, weight, bias)
    # oneDNN compiles code for every number of rows, and caches about a thousand of them. Rows in steps keep small
    # products from compiling in every call; the outputs of added rows are dropped.
    padded = states.new_empty(rows + short, states.shape[-1])
    padded[:rows] = states.reshape(rows, -1)
    padded[rows:] = 0
    return _by_onednn(padded, weight, bias)[:rows].view(*states.shape[:-1], -1)


@cache
def onednn_is_faster() -> bool:
    """Return whether oneDNN multiplies float32 matrices at least a tenth faster than `F.linear`; measured once."""
    try:
        steps = [torch.arange(size, dtype=torch.float32, device="cpu") for size in (128 * 384, 192 * 384, 192)]
        states, weight, bias = (step.sin() for step in steps)
        states, weight = states.view(128, 384), weight.view(192, 384)
        with torch.no_grad():
            passes: list[Callable[[], Tensor]] = [
                partial(multiply, states, weight, bias) for multiply in (F.linear, _by_onednn)
            ]
            if not torch.allclose(passes[0](), passes[1](), rtol=1e-3, atol=1e-3):
                return False
            stock, other = in_turn(passes, states.device, runs=15)
    except (AttributeError, RuntimeError, TypeError):  # another release of torch, or one built without oneDNN
        return False
    return float(np.median(other)) * _GAIN < float(np.median(stock))


def _eligible(states: Tensor, weight: Tensor) -> bool:
    return (
        states.is_cpu
        and weight.is_cpu
        and states.dtype is torch.float32
        and weight.dtype is torch.float32
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
    )


def _by_onednn(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    output: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
    return output

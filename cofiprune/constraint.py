"""The sparsity constraint: a Lagrangian term whose multipliers are learned by gradient ascent.

Training minimises over weights and gates, and maximises over the multipliers, the total loss that contains
lambda_1 (s - t) + lambda_2 (s - t)^2 for expected sparsity s and target t. While s is short of t the first multiplier
falls and the second grows, until the pressure on the gates is strong enough (Wang et al., 2020, arXiv:1910.04732).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cofiprune.errors import SettingsError, TargetError


def target_at(step: int, *, target: float, warmup_steps: int, start: float = 0.0, start_step: int = 0) -> float:
    """Return the target sparsity at `step`: a linear ramp from `start` to `target`, then `target` itself.

    :param step: optimiser step from 0; before `start_step` the ramp stays at `start`.
    :param target: sparsity in [0, 1] from step `start_step + warmup_steps` on.
    :param warmup_steps: length of the ramp, at least 0; 0 asks for the target at once.
    :param start: sparsity in [0, 1] at step `start_step`; may lie above the target.
    :raises TargetError: for a sparsity outside [0, 1].
    :raises SettingsError: for a negative `warmup_steps`.

    >>> [target_at(step, target=0.9, warmup_steps=3) for step in (0, 1, 3, 4)]
    [0.0, 0.3, 0.9, 0.9]
    """
    if not (0 <= target <= 1 and 0 <= start <= 1):
        raise TargetError(f"a sparsity lies between 0 and 1; asked for a ramp from {start} to {target}")
    if warmup_steps < 0:
        raise SettingsError(f"warmup_steps is {warmup_steps}; it must be at least 0")
    if step < start_step:
        return start
    done = step - start_step
    return target if done >= warmup_steps else start + (target - start) * done / warmup_steps


class Constraint(nn.Module):
    """The term lambda_1 (s - t) + lambda_2 (s - t)^2, with multipliers that start at 0.

    Add the term to the loss, and `ascent_group` to the optimiser's groups: one step then descends in weights and gates,
    and ascends here. The gradients of the multipliers, s - t and (s - t)^2, are at most 1 and need no clipping.

    >>> constraint = Constraint()
    >>> optimizer = torch.optim.AdamW([constraint.ascent_group(learning_rate=0.01)])
    >>> constraint(torch.tensor(0.2), 0.5).backward()
    >>> optimizer.step()
    >>> round(constraint.lambda_1.item(), 4), round(constraint.lambda_2.item(), 4)
    (-0.01, 0.01)
    """

    def __init__(self) -> None:
        super().__init__()
        self.lambda_1 = nn.Parameter(torch.zeros(()))
        self.lambda_2 = nn.Parameter(torch.zeros(()))

    def forward(self, sparsity: Tensor, target: float | Tensor) -> Tensor:
        """Return the term, a scalar of either sign: 0 where sparsity equals target.

        :param sparsity: scalar, expected sparsity, differentiable in the gates.
        :param target: target sparsity at this step, see `target_at`.
        """
        gap = sparsity - target
        return self.lambda_1 * gap + self.lambda_2 * gap.square()

    def ascent_group(self, learning_rate: float) -> dict[str, Any]:
        """Return an optimiser's group that ascends; without weight decay, which would pull towards no constraint."""
        return {"params": list(self.parameters()), "lr": learning_rate, "maximize": True, "weight_decay": 0.0}

"""Levels of blocks by dynamic programming: as little lost as trying all of them finds, and the target is met."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from cofiprune import accounting
from cofiprune.adapter import structure as structure_of
from cofiprune.errors import TargetError
from cofiprune.selection.curves import Losses
from cofiprune.selection.knapsack import allocate, combination
from cofiprune.selection.target import TOLERANCE, Target
from cofiprune.structure import Structure

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def tiny() -> Structure:
    with torch.device("meta"):
        return structure_of(BertModel(BertConfig(vocab_size=20, max_position_embeddings=8, **SIZES)))


def worths(structure: Structure, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(group.size, generator=generator) for name, group in structure.items()}


@pytest.mark.parametrize("wanted", [3.0, 17.0, 30.0])
@pytest.mark.parametrize("seed", range(5))
def test_nothing_loses_less_than_what_is_found(wanted: float, seed: int) -> None:
    drawn = np.random.default_rng(seed)
    tables = [(np.append(0, drawn.integers(1, 12, 4)).astype(float), np.append(0, drawn.random(4))) for _ in range(4)]
    every = [
        (sum(tables[block][0][level] for block, level in enumerate(levels)),
         sum(tables[block][1][level] for block, level in enumerate(levels)))
        for levels in itertools.product(range(5), repeat=4)
    ]  # fmt: skip
    off, loss, levels = combination(tables, wanted, 1.0, slack=2.0)
    nearest = min(max(abs(saved - wanted) - 2.0, 0.0) for saved, _ in every)
    assert off == nearest
    assert loss == pytest.approx(min(lost for saved, lost in every if max(abs(saved - wanted) - 2.0, 0.0) == nearest))
    assert loss == pytest.approx(sum(tables[block][1][level] for block, level in enumerate(levels)))


@pytest.mark.parametrize("round_to", [1, 4, 8])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_target_is_met_in_round_sizes(share: float, round_to: int) -> None:
    with torch.device("meta"):
        config = BertConfig(hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=384)
        structure = structure_of(BertModel(config))
    target = Target.of(structure, share, round_to=round_to)
    sizes = allocate(structure, Losses.of(structure, worths(structure)), target)
    left = accounting.layer_parameters(structure).exact(sizes) / target.total
    assert left == pytest.approx(1 - share, abs=TOLERANCE)
    for name, size in sizes.items():
        if name == "hidden" or name.endswith(".intermediate"):
            assert size % round_to == 0, name


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_hidden_dimensions_of_infinite_loss_stay(share: float) -> None:
    structure = tiny()
    found = Losses.of(structure, worths(structure))
    hidden = np.where(np.arange(33) < 20, np.inf, 1e-6 * found.by_count["hidden"])  # the others are as good as free
    sizes = allocate(structure, Losses({**found.by_count, "hidden": hidden}, found.gates), Target.of(structure, share))
    assert 20 <= sizes["hidden"] < 32


def test_what_no_sizes_reach_is_an_error() -> None:
    structure = tiny()
    worth = Losses.of(structure, {"layers.0.intermediate": torch.rand(64)})
    with pytest.raises(TargetError, match="sparsity 0.9 cannot be met"):
        allocate(structure, worth, Target.of(structure, 0.9))
    assert allocate(structure, worth, Target.of(structure, 0.2), may_empty=False)["layers.0.intermediate"] < 64

"""Levels of blocks by dynamic programming: as little lost as trying all of them finds, and the target is met."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from cofiprune import accounting
from cofiprune.adapter import structure as structure_of
from cofiprune.errors import TargetError
from cofiprune.selection.curves import LossCurve, block_tables, units_kept
from cofiprune.selection.knapsack import best_sizes, combination
from cofiprune.selection.target import TOLERANCE, Target
from cofiprune.structure import Structure

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def tiny() -> Structure:
    with torch.device("meta"):
        return structure_of(BertModel(BertConfig(vocab_size=20, max_position_embeddings=8, **SIZES)))


def curves_of(structure: Structure, seed: int = 0) -> dict[str, LossCurve]:
    generator = torch.Generator().manual_seed(seed)
    return {name: LossCurve.of(torch.rand(group.size, generator=generator)) for name, group in structure.items()}


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
    sizes = best_sizes(structure, curves_of(structure), target)
    left = accounting.layer_parameters(structure).exact(sizes) / target.total
    assert left == pytest.approx(1 - share, abs=TOLERANCE)
    for name, size in sizes.items():
        if name == "hidden" or name.endswith(".intermediate"):
            assert size % round_to == 0, name


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_hidden_dimensions_of_infinite_loss_stay(share: float) -> None:
    structure = tiny()
    hidden = LossCurve.of(1e-6 * torch.rand(32)).keeping(20)  # the others are as good as free
    sizes = best_sizes(structure, {**curves_of(structure), "hidden": hidden}, Target.of(structure, share))
    assert 20 <= sizes["hidden"] < 32


def test_where_no_sizes_meet_the_target_the_nearest_are_returned() -> None:
    structure = tiny()
    curves = {"layers.0.intermediate": LossCurve.of(torch.rand(64))}
    target = Target.of(structure, 0.9)
    sizes = best_sizes(structure, curves, target)
    assert sizes["layers.0.ffn"] == 0
    with pytest.raises(TargetError, match=r"the nearest plan to sparsity 0.9 has sparsity 0\.\d"):
        target.check(structure, sizes)


def test_a_block_keeps_what_it_must() -> None:
    structure = tiny()
    curves = {"layers.0.intermediate": LossCurve.of(torch.rand(64)).keeping(1)}
    sizes = best_sizes(structure, curves, Target.of(structure, 0.9))
    assert sizes == {**structure.sizes, "layers.0.intermediate": 1}


def test_a_curve_gives_up_the_least_important_units_first() -> None:
    curve = LossCurve.of(torch.tensor([3.0, 1.0, 2.0, 1.0]))
    assert curve.order == (3, 1, 2, 0)  # of equal ones the first stays longest
    assert curve.loss == (1.0, 2.0, 4.0, 7.0)
    assert curve.by_size.tolist() == [7, 4, 2, 1, 0]
    assert curve.keeping(3).loss == (1.0, np.inf, np.inf, np.inf)
    assert LossCurve.of(torch.ones(3), torch.tensor([2.0, 0.0, 1.0])).order == (1, 2, 0)
    structure = tiny()
    kept = units_kept(structure, {"layers.0.heads": curve}, {"layers.0.heads": 3})
    assert kept["layers.0.heads"].tolist() == [1, 1, 1, 0]


def test_tables_say_what_each_size_of_a_block_saves_and_loses() -> None:
    structure = tiny()
    cost = accounting.layer_parameters(structure)
    curves = {
        "layers.0.intermediate": LossCurve.of(torch.ones(64)),
        "layers.1.ffn": LossCurve((0,), (5.0,)),
        "layers.1.heads": LossCurve.of(torch.ones(4)).keeping(1),
    }
    tables = {table.block.gate: table for table in block_tables(structure, curves, cost, 20, step=24)}
    sizes = {**structure.sizes, "hidden": 20}
    saved = cost.exact(sizes) - cost.exact({**sizes, "layers.0.intermediate": 48})
    assert tables["layers.0.ffn"].saved[48] == saved
    assert tables["layers.0.ffn"].loss[48] == 16
    allowed = {gate: table.allowed.tolist() for gate, table in tables.items()}
    assert allowed == {
        "layers.0.attention": [4], "layers.0.ffn": [0, 24, 48, 64], "layers.1.attention": [1, 2, 3, 4],
        "layers.1.ffn": [0, 64],
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_a_budget_goes_where_it_loses_least(seed: int) -> None:
    """No exchange of a unit of one group for units of another that keeps the cost loses noticeably less."""
    structure = tiny()
    curves = {name: curve for name, curve in curves_of(structure, seed).items() if name != "hidden"}
    cost, target = accounting.layer_parameters(structure), Target.of(structure, 0.2 + 0.1 * seed)
    sizes = best_sizes(structure, curves, target)

    def lost(sizes: dict[str, int]) -> float:
        tables = block_tables(structure, curves, cost, 32)
        return sum(float(table.loss[sizes[table.block.inner or ""]]) for table in tables)

    def off(sizes: dict[str, int]) -> float:
        return abs(cost.exact(sizes) - target.budget)

    inner = [block.inner for block in structure.blocks if block.inner is not None and sizes[block.gate]]
    for one, other in itertools.permutations(inner, 2):
        for fewer, more in itertools.product(range(1, 5), range(1, 9)):
            moved = {**sizes, one: sizes[one] - fewer, other: sizes[other] + more}
            if moved[one] >= 1 and moved[other] <= structure[other].size and off(moved) <= off(sizes):
                assert lost(moved) >= 0.97 * lost(sizes)

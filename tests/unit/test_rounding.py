"""The multiple for kept sizes is the coarsest that pays, and no coarser."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import cofiprune
from cofiprune.latency import target
from cofiprune.latency.target import CANDIDATES, best_multiple, cheapest, sizes_of


def timed(piece: int, per_unit: float = 1.0, fixed: float = 0.0) -> dict[int, float]:
    """Times on a device that takes units in pieces."""
    sizes = {size for each in CANDIDATES for size in sizes_of(each)}
    return {size: fixed + per_unit * piece * -(-size // piece) for size in sizes}


def test_a_device_that_takes_units_in_pieces_gets_multiples_of_them():
    for piece in CANDIDATES:
        assert cheapest(timed(piece), CANDIDATES) == piece


def test_where_no_size_is_better_than_another_none_is_asked_for():
    assert cheapest(timed(1), CANDIDATES) == 1
    assert cheapest({size: size * 0.5 for size in timed(1)}, CANDIDATES) == 1


def test_sizes_are_multiples_and_those_of_one_are_of_no_other():
    for each in CANDIDATES:
        assert all(size % each == 0 for size in sizes_of(each))
    assert not any(size % 8 == 0 for size in sizes_of(1))


def model(intermediate: int) -> BertForSequenceClassification:
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(**sizes, intermediate_size=intermediate))


def test_it_is_measured_on_the_device_once_and_is_never_coarser_than_the_blocks_allow(monkeypatch):
    calls = []
    original = target.in_turn

    def counted(passes, *args, **kwargs):
        calls.append(len(passes))
        return original(passes, *args, **{**kwargs, "seconds": 0.01})

    monkeypatch.setattr(target, "in_turn", counted)
    target._timed_multiple.cache_clear()
    small, large = model(48), model(512)
    assert best_multiple(small, cofiprune.structure(small), rows=8) == 1
    found = {best_multiple(large, cofiprune.structure(large), rows=8) for _ in range(3)}
    assert len(found) == 1
    assert found <= set(CANDIDATES)
    assert len(calls) == 2


def test_auto_asks_for_it(monkeypatch):
    from cofiprune.training import targets

    monkeypatch.setattr(targets, "best_multiple", lambda *args, rows: 4)
    torch.manual_seed(0)
    pruned = model(64)
    with pytest.warns(UserWarning, match="without data"):
        result = cofiprune.prune(pruned, target_sparsity=0.5, teacher="self", round_to="auto")
    assert result.plan.kept["layers.0.intermediate"] % 4 == 0
    assert result.plan.kept["hidden"] % 4 == 0
    assert abs(result.sparsity - 0.5) <= 0.005

"""Targets: what people ask for, in whichever cost, becomes one type; contradictions and nonsense are errors."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import cofiprune
from cofiprune import PruneConfig, accounting
from cofiprune.adapter import structure as structure_of
from cofiprune.errors import TargetError
from cofiprune.selection.by_score import select
from cofiprune.selection.reachable import check_target
from cofiprune.selection.target import TOLERANCE, Target, parse_target
from cofiprune.training.arguments import target_for
from small import bert as new_bert

bert = partial(
    new_bert, hidden_size=32, num_hidden_layers=3, intermediate_size=64, vocab_size=50, max_position_embeddings=160
)


def test_without_a_target_it_is_a_sparsity_of_nine_tenths() -> None:
    assert parse_target({"target_sparsity": None, "target_macs": None}) == ("target_sparsity", 0.9)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"target_sparsity": 0.5, "target_macs": 1e6}, ["target_sparsity=0.5 and target_macs=1000000.0", "one target"]),
        ({"target_model_sparsity": 1.0}, ["target_model_sparsity", "(0, 1)"]),
        ({"target_macs": 0.4}, ["not a share", "0.4 * cofiprune.summary(model).macs"]),
        ({"target_macs": -5}, ["above 0", "-5"]),
        ({"target_macs": "many"}, ["number", "'many'"]),
        ({"target_macs": float("nan")}, ["above 0", "nan"]),
    ],
)
def test_what_cannot_be_meant_is_an_error(asked: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(TargetError) as caught:
        cofiprune.prune(bert(), **asked)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("share", [0.3, 0.7])
@pytest.mark.parametrize("name", ["target_model_sparsity", "target_macs"])
def test_a_target_in_another_cost_is_met(name: str, share: float) -> None:
    model = bert()
    before = cofiprune.summary(model, seq_len=64)
    asked = share if name == "target_model_sparsity" else (1 - share) * before.macs
    with pytest.warns(UserWarning, match="without data"):
        result = cofiprune.prune(model, target_seq_len=64, **{name: asked})
    after = cofiprune.summary(result.compact(), seq_len=64)
    found = 1 - (after.parameters / before.parameters if name == "target_model_sparsity" else after.macs / before.macs)
    assert abs(found - share) <= TOLERANCE
    assert result.target is not None
    assert result.target.name == name
    assert result.target.asked == asked
    assert result.target.reached == pytest.approx(found if name == "target_model_sparsity" else after.macs)
    assert str(result.target) in repr(result)


def test_what_is_reachable_is_said_in_the_words_of_the_target() -> None:
    model = bert()
    structure = structure_of(model)
    macs = cofiprune.summary(model, seq_len=128).macs
    target = target_for(model, structure, PruneConfig(), "target_macs", 0.01 * macs)
    with pytest.raises(TargetError, match=r"MACs at 128 tokens cannot be reached with units head .* gives .* MACs"):
        check_target(structure, target, ("head",))
    with pytest.raises(TargetError, match="a target lies below that"):
        target_for(model, structure, PruneConfig(), "target_macs", 2 * macs)


def test_a_smaller_model_goes_on_to_the_same_amount() -> None:
    model = bert()
    structure = structure_of(model)
    target = Target.of(structure, 0.8)
    scores = {name: torch.rand(group.size) for name, group in structure.items()}
    first = select(structure, scores, target.at(0.4))
    small = structure_of(cofiprune.compact(model, first))
    assert target.kept_share(small) == pytest.approx(0.6, abs=TOLERANCE)
    assert target.removed(small) == pytest.approx(2 / 3, abs=0.01)
    rest = select(small, {name: scores[name][list(first.keep[name])] for name in small}, target)
    cost = accounting.layer_parameters(structure)
    assert accounting.sparsity(cost, structure, first.then(rest).kept) == pytest.approx(0.8, abs=TOLERANCE)


def test_gates_learn_towards_operations() -> None:
    model = bert()
    rows = [{"input_ids": torch.randint(5, 50, (12,)), "labels": index % 2} for index in range(32)]
    macs = cofiprune.summary(model, seq_len=32).macs
    result = cofiprune.prune(
        model, rows, target_macs=0.4 * macs, target_seq_len=32, teacher="self", epochs=2, finetune_epochs=1,
        batch_size=8, one_shot_share=0, progress=False,
    )  # fmt: skip
    assert cofiprune.summary(result.compact(), seq_len=32).macs == pytest.approx(0.4 * macs, abs=TOLERANCE * macs)

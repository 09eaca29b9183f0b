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
        ({"target_file_mb": 0}, ["target_file_mb", "above 0"]),
        ({"target_file_mb": -3.5}, ["target_file_mb", "above 0", "-3.5"]),
        ({"target_file_mb": "50%"}, ["target_file_mb", "number", "'50%'"]),
        ({"target_file_mb": [20, 10]}, ["target_file_mb", "number", "[20, 10]"]),
        ({"target_file_mb": 10, "target_sparsity": 0.5}, ["target_file_mb=10", "one target"]),
        ({"target_file_mb": 10}, ["target_file_mb=10", "the model takes a file of 0.1", "lies below that"]),
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


def size_of(model: Any, folder: Any) -> float:
    model.save_pretrained(folder)
    return float((folder / "model.safetensors").stat().st_size) / 1e6


@pytest.mark.filterwarnings("ignore:pruning without data")
@pytest.mark.parametrize("share", [0.9, 0.45])
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.float32, {"target_file_dtype": "float16", "method": "one-shot"}),
    ],
)
def test_a_file_is_as_large_as_it_may_be(tmp_path: Any, share: float, dtype: torch.dtype, settings: Any) -> None:
    wanted = getattr(torch, settings.get("target_file_dtype", ""), dtype)
    asked = share * size_of(bert(name="BertForMaskedLM").to(wanted), tmp_path)
    model = bert(name="BertForMaskedLM").to(dtype)
    rows = [{"input_ids": [3 + number % 40, 5, 7], "attention_mask": [1, 1, 1]} for number in range(32)]
    result = cofiprune.prune(
        model, rows if "method" in settings else None, target_file_mb=asked, progress=False, **settings
    )
    found = size_of(result.compact().to(wanted), tmp_path)
    assert 0.98 * asked <= found <= asked
    assert result.target is not None
    assert result.target.reached == pytest.approx(found, rel=0.005)
    assert f"a file of {asked:.4g} MB in {str(wanted).removeprefix('torch.')}" in str(result.target)


def test_a_file_of_tables_of_tokens_wants_fewer_of_them_first() -> None:
    with pytest.raises(TargetError, match=r"removing all that can go gives a file of .* MB.*prune_vocabulary.*first"):
        cofiprune.prune(bert(vocab_size=4000), target_file_mb=0.3, units=("head", "intermediate"))


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

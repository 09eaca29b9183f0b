"""What binds the gates to a model: the target relative to the dense model, evaluation, and no look at the device."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AlbertConfig, AlbertModel, BertConfig, BertModel, PreTrainedModel

from cofiprune import PruneConfig, accounting, attach, compact
from cofiprune.adapter import structure as structure_of
from cofiprune.distillation import hidden_projection, layerwise_loss
from cofiprune.gates import COFI_INITIAL, COFI_LIMIT, Gates
from cofiprune.selection.target import Target
from cofiprune.structure import Group
from cofiprune.training.learner import GateLearner
from cofiprune.training.resolved import Facts, Schedule, resolve
from small import bert as new_bert

SCHEDULE = Schedule(steps_per_epoch=10, before=5, ramp=10, gated=20, after=5)


bert = partial(new_bert, "BertModel", intermediate_size=48)


def gating(model: PreTrainedModel, target: float = 0.9, *, share: float = 1.0) -> GateLearner:
    masks = attach(model)
    total = round(accounting.layer_parameters(masks.structure).exact(masks.structure.sizes) / share)
    goal = Target.create("target_sparsity", target, accounting.layer_parameters, total)
    settings = resolve(PruneConfig(), Facts(100, target=goal.share))
    return GateLearner(masks, goal, settings, SCHEDULE, layers_left=share)


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_targets_and_sparsities_count_from_the_dense_model(share: float) -> None:
    model = bert()
    found = gating(model, 0.9, share=share)
    asked = [found.target_at(step) for step in (0, 5, 10, 15, 24)]
    assert asked == pytest.approx([1 - share, 1 - share, (1 - share + 0.9) / 2, 0.9, 0.9])
    assert found.sparsity() == pytest.approx(1 - share)
    found.penalty(24)
    assert found.progress(24)["expected_sparsity"] == pytest.approx(1 - share, abs=0.01)
    plan = found.decide(lambda plan: compact(model, plan))
    kept = found.cost.exact(plan.kept) / found.cost.exact(found.masks.structure.sizes)
    assert 1 - share * kept == pytest.approx(0.9, abs=0.005)


def test_the_pressure_vanishes_where_the_target_is_met() -> None:
    found = gating(bert(), 0.9, share=0.4)
    with torch.no_grad():
        found.constraint.lambda_1.fill_(1.0)
    penalty, sparsity = found.penalty(24), found.progress(24)["expected_sparsity"]
    # What is left to remove of the smaller model: 0.75 of its 0.4 is 0.3 of the dense one.
    gap = 1 - (1 - sparsity) / 0.4 - 0.75
    assert float(penalty.detach()) == pytest.approx(gap, abs=1e-6)


def test_gates_learn_between_plain_training_and_the_decided_structure() -> None:
    found = gating(bert())
    assert [step for step in range(40) if found.is_active(step)] == list(range(5, 25))


def test_evaluation_runs_under_deterministic_gates() -> None:
    found = gating(bert())
    with torch.no_grad():
        found.gates.log_alpha.normal_(generator=torch.Generator().manual_seed(0))
    found.bind(3)
    for _ in range(2):  # whatever was drawn before
        found.settle()
        for name, value in found.gates.deterministic().items():
            assert torch.equal(found.masks[name], value)
            assert bool((value > 0).any()) or name != "hidden"
        found.bind(4)
    with torch.no_grad():
        found.gates.log_alpha.fill_(-50.0)
    found.settle()
    assert int((found.masks["hidden"] > 0).sum()) == 1  # a model without hidden dimensions computes nothing


def test_a_layer_exists_while_one_of_its_blocks_does() -> None:
    found = gating(bert())
    found.masks["layers.0.attention"] = [0]
    assert found.alive_layers().tolist() == [True, True]
    found.masks["layers.0.intermediate"] = [0] * 48
    assert found.alive_layers().tolist() == [False, True]
    found.masks["layers.1.ffn"] = [0]
    assert found.alive_layers().tolist() == [False, True]


def test_a_layer_that_is_applied_several_times_exists_as_often() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 48, "embedding_size": 8}
    config = AlbertConfig(vocab_size=40, num_hidden_layers=5, num_hidden_groups=2, inner_group_num=1, **sizes)
    model = AlbertModel(config).eval()
    found = gating(model)
    states = model(torch.tensor([[3, 4, 5]]), output_hidden_states=True).hidden_states
    assert states is not None
    assert len(found.alive_layers()) == len(states) - 1 == 5
    found.masks["layers.1.attention"] = found.masks["layers.1.ffn"] = [0]
    assert found.alive_layers().tolist() == [True, True, True, False, False]
    chosen = {4: states[5].detach() + 1}
    projection = hidden_projection(24, 24)
    loss = layerwise_loss(states[1:], chosen, projection, how="same-index", teacher_depth=5, alive=found.alive_layers())
    assert float(loss.detach()) == pytest.approx(float((states[3] - chosen[4]).square().mean().detach()))


def test_without_importance_nothing_is_closed_at_the_start_and_in_the_original_a_ninth_was() -> None:
    with torch.device("meta"):
        structure = structure_of(BertModel(BertConfig()))  # BERT-base
    cost = accounting.layer_parameters(structure)
    dense = cost.exact(structure.sizes)

    def start(gates: Gates) -> tuple[float, dict[str, int]]:
        expected = 1 - float(cost.expected(gates.expected_sizes()).detach()) / dense
        return expected, {name: int((value > 0).sum()) for name, value in gates.deterministic().items()}

    groups: list[Group] = list(structure.groups)
    here, kept = start(Gates(groups))
    assert here < 0.01
    assert kept == structure.sizes
    original, kept = start(Gates(groups, initial=COFI_INITIAL, limit=COFI_LIMIT))
    assert original == pytest.approx(0.11, abs=0.01)
    assert kept["hidden"] == 766


class _Reads(TorchDispatchMode):
    """Counts how often a value of a tensor is read on the host, which makes a GPU wait."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return func(*args, **(kwargs or {}))


def test_a_step_under_gates_reads_no_value_on_the_host() -> None:
    inputs = {"input_ids": torch.tensor([[2, 5, 9, 11]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    model = bert()
    with _Reads() as stock:
        model(**inputs).last_hidden_state.sum().backward()
    found = gating(model)
    with _Reads() as gated:
        found.bind(0)
        loss = model(**inputs).last_hidden_state.sum() + found.penalty(20) + 0.0 * found.alive_layers().sum()
        loss.backward()
        found.gates.clamp_()
    assert gated.count == stock.count
    assert found.gates.log_alpha.grad is not None
    with _Reads() as reading:
        loss.detach().item()
    assert reading.count == 1


def test_closed_gates_go_after_some_checks_unless_that_is_more_than_the_target() -> None:
    found = gating(bert(), 0.5)
    assert found.long_closed() is None
    with torch.no_grad():
        found.gates.log_alpha.fill_(-20)
    for _ in range(4):
        assert found.long_closed() is None
    first = found.gates.groups[-1]
    with torch.no_grad():
        found.gates.log_alpha[: -first.size].fill_(20)
    plan = found.long_closed()
    assert plan is not None
    assert plan.kept[first.name] == 0
    assert all(kept for name, kept in plan.kept.items() if not name.startswith("layers.1.ffn") and name != first.name)

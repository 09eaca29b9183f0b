"""Masks on a stock model: what they take, what they refuse, and that nothing of the model changes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import cofiprune
from cofiprune import MaskRegistry, Plan
from cofiprune.conformance.specimens import outputs
from cofiprune.errors import AdapterError, MaskError, PlanError, StructureError
from cofiprune.masking import masks_of
from small import Batch, batch_of, build, logits, randomise


@pytest.fixture
def model() -> PreTrainedModel:
    return build("BertForSequenceClassification")


@pytest.fixture
def batch(model: PreTrainedModel) -> Batch:
    return batch_of(model)


def test_masks_start_as_ones_and_change_nothing(model: PreTrainedModel, batch: Batch) -> None:
    before = logits(model, batch)
    masks = cofiprune.attach(model)
    assert all(bool((value == 1).all()) for value in masks.values())
    assert masks.sparsity() == 0
    assert torch.equal(logits(model, batch), before)


@pytest.mark.parametrize("value", [[1, 0, 0.5, 1], (1, 0, 0.5, 1), torch.tensor([1, 0, 0.5, 1])])
def test_masks_take_numbers_of_any_form(model: PreTrainedModel, batch: Batch, value: list[float]) -> None:
    before = logits(model, batch)
    masks = cofiprune.attach(model)
    masks["layers.0.heads"] = value
    assert masks["layers.0.heads"].tolist() == [1, 0, 0.5, 1]
    assert not torch.equal(logits(model, batch), before)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers.0.heads", [1, 1, 1], r"'layers.0.heads' takes 4 values, one per unit; got shape \(3,\)"),
        ("layers.0.heads", [[1, 1, 1, 1]], r"got shape \(1, 4\)"),
        ("layers.0.heads", 1, r"got shape \(\)"),
        ("layers.0.heads", [1, float("nan"), 1, 1], "not numbers"),
        ("layers.0.heads", [1, float("inf"), 1, 1], "not numbers"),
        ("layers.0.heads", [1, 1.5, 1, 1], r"must lie in \[0, 1\]; found 1 to 1.5"),
        ("layers.0.heads", [1, -0.1, 1, 1], r"must lie in \[0, 1\]; found -0.1 to 1"),
        ("layers.0.heads", ["a", 1, 1, 1], r"takes 4 numbers in \[0, 1\]"),
        ("layers.0.heads", None, r"takes 4 numbers in \[0, 1\]"),
        ("hidden", [0] * 24, "would remove every hidden dimension"),
    ],
)
def test_wrong_values_are_refused_and_leave_the_mask(
    model: PreTrainedModel, name: str, value: object, message: str
) -> None:
    masks = cofiprune.attach(model)
    with pytest.raises(MaskError, match=message) as caught:
        masks[name] = value  # type: ignore[assignment]
    assert isinstance(caught.value, ValueError)
    assert bool((masks[name] == 1).all())


def _assign(mask: Tensor, value: Tensor) -> None:
    mask.data = value


@pytest.mark.parametrize(
    "write",
    [
        lambda mask: mask.zero_(),
        lambda mask: mask.data.zero_(),
        lambda mask: mask.data.mul_(0.5),
        lambda mask: mask.numpy().__setitem__(0, 0.25),
        lambda mask: mask.untyped_storage().fill_(0),
        lambda mask: _assign(mask, torch.tensor([0, 1, 0.5, 1], dtype=torch.float64)),
    ],
)
def test_what_is_written_into_a_mask_counts_however(
    model: PreTrainedModel, batch: Batch, write: Callable[[Tensor], None]
) -> None:
    masks = cofiprune.attach(model)
    before = logits(model, batch)
    write(masks["layers.0.heads"])
    assert not torch.equal(logits(model, batch), before)
    assert torch.allclose(logits(cofiprune.compact(model), batch), logits(model, batch), atol=1e-5)


@pytest.mark.parametrize(
    "write",
    [
        lambda mask: mask.data.fill_(2),
        lambda mask: mask.numpy().fill(float("nan")),
        lambda mask: mask.resize_(3),
        lambda mask: _assign(mask, torch.ones(5)),
        lambda mask: _assign(mask, torch.ones(1, 4)),
    ],
)
def test_what_is_written_into_a_mask_is_checked(
    model: PreTrainedModel, batch: Batch, write: Callable[[Tensor], None]
) -> None:
    masks = cofiprune.attach(model)
    logits(model, batch)
    write(masks["layers.0.heads"])
    for look in (lambda: logits(model, batch), masks.plan, masks.sparsity, lambda: cofiprune.compact(model)):
        with pytest.raises(MaskError, match=r"layers\.0\.heads"):
            look()


def test_unknown_names_get_near_misses(model: PreTrainedModel) -> None:
    masks = cofiprune.attach(model, "head")
    with pytest.raises(StructureError, match=r"Did you mean 'layers\.0\.heads'"):
        masks["layers.0.head"] = [1, 1, 1, 1]
    with pytest.raises(
        StructureError, match="no mask is attached for 'hidden'; attach with units that include 'hidden'"
    ):
        _ = masks["hidden"]
    with pytest.raises(MaskError, match="cannot be deleted"):
        del masks["layers.0.heads"]


def test_masks_and_structures_are_mappings_for_unknown_names_too(model: PreTrainedModel) -> None:
    masks = cofiprune.attach(model, "head")
    for mapping in (masks, masks.structure):
        assert "layers.0.heads" in mapping
        assert "layers.99.heads" not in mapping
        assert mapping.get("layers.99.heads") is None
        with pytest.raises(KeyError, match="^no group 'layers.99.heads' in this bert model. Did you mean"):
            _ = mapping["layers.99.heads"]
    assert "hidden" not in masks, "it has no mask here"
    assert masks.pop("layers.99.heads", None) is None


def test_units_choose_the_masks(model: PreTrainedModel) -> None:
    with cofiprune.attach(model, ("head", "hidden")) as masks:
        assert list(masks) == ["hidden", "layers.0.heads", "layers.1.heads"]
    with pytest.raises(StructureError, match="Did you mean 'intermediate'"):
        cofiprune.attach(model, "intermediates")
    assert masks_of(model) is None


def test_edits_of_a_mask_tensor_take_effect(model: PreTrainedModel, batch: Batch) -> None:
    masks = cofiprune.attach(model)
    masks["layers.0.heads"] = [0, 1, 1, 1]
    expected = logits(model, batch)
    masks["layers.0.heads"] = [1, 1, 1, 1]
    logits(model, batch)
    masks["layers.0.heads"][0] = 0
    assert torch.equal(logits(model, batch), expected)
    assert masks.plan().keep["layers.0.heads"] == (1, 2, 3)
    masks["layers.0.heads"].fill_(2)
    with pytest.raises(MaskError, match=r"must lie in \[0, 1\]"):
        logits(model, batch)


def test_a_second_registry_is_refused_until_the_first_is_detached(model: PreTrainedModel) -> None:
    masks = cofiprune.attach(model)
    with pytest.raises(MaskError, match=r"attached to this model already; call masks.detach\(\) first"):
        cofiprune.attach(model)
    masks.detach()
    masks.detach()
    cofiprune.attach(model).detach()


def test_names_and_weights_stay_and_leaving_the_context_gives_the_stock_model_back(
    model: PreTrainedModel, batch: Batch
) -> None:
    def names() -> list[list[str]]:
        return [[name for name, _ in members] for members in (model.named_parameters(), model.named_modules())]

    before, stock = logits(model, batch), names()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    with pytest.raises(RuntimeError, match="mine"), cofiprune.attach(model) as masks:  # noqa: PT012
        randomise(masks, fractional=True)
        assert not torch.equal(logits(model, batch), before)
        assert names() == stock
        assert list(model.state_dict()) == list(weights)
        raise RuntimeError("mine")
    assert masks_of(model) is None
    assert torch.equal(logits(model, batch), before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert [module.__dict__.get("forward") for module in model.modules()] == forwards


def test_a_block_without_units_is_a_block_without_its_gate(model: PreTrainedModel, batch: Batch) -> None:
    with cofiprune.attach(model) as masks:
        masks["layers.0.attention"] = [0]
        masks["layers.1.ffn"] = [0]
        by_gate = logits(model, batch)
    with cofiprune.attach(model) as masks:
        masks["layers.0.heads"] = [0] * 4
        masks["layers.1.intermediate"] = [0] * 34
        assert torch.equal(logits(model, batch), by_gate)
        assert masks.plan().keep["layers.0.attention"] == ()


def test_the_state_of_a_model_without_blocks_is_its_embedding() -> None:
    model = build("BertModel")
    batch = batch_of(model)
    with torch.no_grad():
        embedded = model.embeddings(input_ids=batch["input_ids"])
    with cofiprune.attach(model, "layer") as masks:
        for name in masks:
            masks[name] = [0]
        assert torch.equal(outputs(model, batch)["last_hidden_state"], embedded)


def test_fractional_masks_scale() -> None:
    """A head, a feed-forward dimension and a block are scaled before the residual is added."""
    model = build("BertModel", num_hidden_layers=1)
    batch = batch_of(model)
    layer = model.encoder.layer[0]
    found: dict[str, Tensor] = {}
    hook = layer.output.dense.register_forward_hook(lambda module, args, output: found.update(ffn=output))
    with torch.no_grad(), cofiprune.attach(model) as masks:
        model(**batch)
        whole = found["ffn"]
        masks["layers.0.ffn"] = [0.25]
        model(**batch)
        torch.testing.assert_close(found["ffn"], 0.25 * whole, rtol=1e-12, atol=1e-12)
        masks["layers.0.ffn"] = [1]
        masks["layers.0.intermediate"] = [0.25] * 34
        model(**batch)
        bias = layer.output.dense.bias
        torch.testing.assert_close(found["ffn"] - bias, 0.25 * (whole - bias), rtol=1e-12, atol=1e-12)
    hook.remove()


def test_differentiable_masks_give_the_outputs_of_set_ones(model: PreTrainedModel, batch: Batch) -> None:
    masks = cofiprune.attach(model)
    randomise(masks, fractional=True)
    expected = logits(model, batch)
    values = {name: value.clone().requires_grad_() for name, value in masks.items()}
    randomise(masks, seed=1)
    masks.bind(values)
    found = model(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad(found.square().sum(), list(values.values()))
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    assert all(bool(gradient.any()) for name, gradient in zip(values, gradients, strict=True) if name != "hidden")
    masks.unbind()
    assert not torch.allclose(logits(model, batch), expected)


def test_the_gradient_of_a_mask_is_that_of_finite_differences(model: PreTrainedModel, batch: Batch) -> None:
    masks = cofiprune.attach(model)
    randomise(masks, fractional=True)
    name, step = "layers.0.heads", 1e-6
    values = {key: value.clone() for key, value in masks.items()}
    values[name] = torch.tensor([0.3, 0.5, 0.7, 0.9], dtype=torch.float64, requires_grad=True)
    masks.bind(values)
    (gradient,) = torch.autograd.grad(model(**batch).logits.sum(), values[name])
    for unit in range(4):
        sums = []
        for sign in (1, -1):
            moved = values[name].detach().clone()
            moved[unit] += sign * step
            masks.bind({**values, name: moved})
            sums.append(logits(model, batch).sum())
        assert gradient[unit].item() == pytest.approx(((sums[0] - sums[1]) / (2 * step)).item(), rel=1e-5, abs=1e-8)


def test_a_plan_can_be_set(model: PreTrainedModel) -> None:
    masks = cofiprune.attach(model)
    randomise(masks, fractional=True)
    plan = masks.plan()
    before = {name: value.clone() for name, value in masks.items()}
    randomise(masks, seed=1)
    masks.set_plan(plan)
    assert all(torch.equal(value, before[name]) for name, value in masks.items())
    masks.detach()
    with (
        cofiprune.attach(model, "head") as heads,
        pytest.raises(StructureError, match="whose masks are not attached; attach all units"),
    ):
        heads.set_plan(plan)
    other = Plan("roberta", plan.sizes, plan.keep)
    with cofiprune.attach(model) as masks, pytest.raises(PlanError, match="is for a 'roberta' model"):
        masks.set_plan(other)


def test_a_copy_of_a_model_has_masks_of_its_own(model: PreTrainedModel, batch: Batch) -> None:
    masks = cofiprune.attach(model)
    masks["layers.0.heads"] = [0, 1, 1, 1]
    expected = logits(model, batch)
    twin = copy.deepcopy(model)
    copied = masks_of(twin)
    assert isinstance(copied, MaskRegistry)
    assert copied is not masks
    assert torch.equal(logits(twin, batch), expected)
    masks["layers.0.heads"] = [1, 1, 1, 1]
    assert torch.equal(logits(twin, batch), expected)
    copied.detach()
    assert masks_of(twin) is None
    assert torch.equal(logits(twin, batch), logits(model, batch))
    assert masks_of(model) is masks
    masks["layers.0.heads"] = [0, 1, 1, 1]
    assert torch.equal(logits(model, batch), expected)


def test_a_registry_prints_what_it_keeps(model: PreTrainedModel) -> None:
    masks = cofiprune.attach(model)
    masks["layers.0.heads"] = [0, 1, 0, 1]
    text = repr(masks)
    assert "MaskRegistry of a bert model, sparsity 0." in text
    assert "layers.0.heads           2 of 4 kept" in text


def test_hidden_states_come_out_masked(model: PreTrainedModel, batch: Batch) -> None:
    with torch.no_grad(), cofiprune.attach(model) as masks:
        row = torch.ones(24)
        row[[3, 7]] = 0
        masks["hidden"] = row
        states = model(**batch, output_hidden_states=True).hidden_states
    assert len(states) == 3
    assert all(bool((state[..., [3, 7]] == 0).all()) for state in states)


def test_moving_a_model_moves_what_its_masks_multiply(model: PreTrainedModel, batch: Batch) -> None:
    masks = cofiprune.attach(model)
    masks["layers.0.heads"] = [0.5, 1, 0, 1]
    expected = logits(model, batch)
    model.to(torch.float32)
    torch.testing.assert_close(logits(model, batch).double(), expected, rtol=1e-4, atol=1e-4)


def _pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def _stored(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("way", [_pickled, _stored, copy.deepcopy])
@pytest.mark.parametrize(
    "name",
    ["BertForSequenceClassification", "DebertaV2ForSequenceClassification", "DistilBertForSequenceClassification"],
)
def test_a_masked_model_that_is_pickled_is_a_masked_model(name: str, way: Callable[[Any], Any]) -> None:
    model = build(name, num_hidden_layers=3)
    batch = batch_of(model)
    stock = logits(model, batch)
    masks = cofiprune.attach(model)
    randomise(masks, fractional=True)
    masks["layers.1.attention"] = [0]
    masks["layers.2.ffn"] = [0]
    expected = logits(model, batch)
    for each in (model, cofiprune.compact(model), cofiprune.compact(model, fuse=True)):
        torch.testing.assert_close(logits(way(each), batch), expected, rtol=1e-10, atol=1e-10)
    copied = masks_of(way(masks_of(model)).on_detach[0].args[0])  # also from the masks' side
    assert copied is not None
    twin = way(model)
    found = masks_of(twin)
    assert found is not None
    torch.testing.assert_close(logits(cofiprune.compact(twin), batch), expected, rtol=1e-10, atol=1e-10)
    found.detach()
    assert torch.equal(logits(twin, batch), stock)
    assert not any("forward" in module.__dict__ for module in twin.modules())
    assert torch.equal(logits(model, batch), expected)


def test_a_copy_has_neither_bound_values_nor_readings(model: PreTrainedModel, batch: Batch) -> None:
    masks = cofiprune.attach(model)
    masks["layers.0.heads"] = [1, 1, 1, 1]
    expected = logits(model, batch)
    learned = torch.ones(4, dtype=torch.float64, requires_grad=True)
    masks.bind({"layers.0.heads": learned * 0.5})
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, batch), expected)
    copied = masks_of(copy.deepcopy(twin))
    assert copied is not None
    copied["layers.0.heads"] = [0, 1, 1, 1]
    reading = copied.read("layers.0.heads")
    assert reading is not None
    assert not reading.ones


@pytest.mark.parametrize("value", [-3.0, 7.0, float("nan")])
@pytest.mark.parametrize(
    "ask", [lambda masks, _: masks.plan(), lambda masks, _: masks.sparsity(), lambda _, model: cofiprune.compact(model)]
)
def test_a_wrong_value_set_in_place_is_found_by_whoever_reads_it(
    model: PreTrainedModel, value: float, ask: Callable[[Any, Any], Any]
) -> None:
    masks = cofiprune.attach(model)
    masks["layers.0.heads"][0] = value
    with pytest.raises(MaskError, match="mask 'layers.0.heads' (must lie in|has values that are not numbers)"):
        ask(masks, model)
    masks["layers.0.heads"] = [1, 1, 1, 1]
    ask(masks, model)


def test_what_inference_mode_made_can_learn(model: PreTrainedModel, batch: Batch) -> None:
    with torch.inference_mode():
        masks = cofiprune.attach(model)
        masks["layers.0.heads"] = [0, 1, 0.5, 1]
        masks["layers.1.attention"] = [0]
        model(**batch)
        made = [cofiprune.compact(model), cofiprune.compact(model, fuse=True)]
        expected = logits(model, batch)
        masks["layers.0.heads"][1] = 0
        made.append(cofiprune.compact(model))
    for small in (*made, model):
        loss = small(**batch).logits.square().sum()
        loss.backward()
        with torch.no_grad():
            for value in small.parameters():
                value.sub_(0.001 * value.grad) if value.grad is not None else None
        assert small(**batch).logits.square().sum() < loss
    assert not torch.equal(logits(made[2], batch), expected)


def test_saving_a_masked_model_says_that_its_masks_are_not_saved(model: PreTrainedModel, tmp_path: Path) -> None:
    with cofiprune.attach(model) as masks:
        model.save_pretrained(tmp_path)
        masks["layers.0.heads"] = [0, 1, 1, 1]
        for each in (model, copy.deepcopy(model), _pickled(model)):
            with pytest.warns(UserWarning, match=r"not the masks.*Save cofiprune.compact\(model\)"):
                each.save_pretrained(tmp_path)
        cofiprune.compact(model).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert "save_pretrained" not in model.__dict__


def test_a_weight_that_is_computed_once_masks_are_on_is_refused_by_name(model: PreTrainedModel, batch: Batch) -> None:
    with cofiprune.attach(model):
        torch.nn.utils.parametrizations.weight_norm(model.get_submodule("bert.encoder.layer.1.output.dense"))
        with pytest.raises(AdapterError, match=r"'bert.encoder.layer.1.output.dense' is no parameter: .*remove_param"):
            model(**batch)

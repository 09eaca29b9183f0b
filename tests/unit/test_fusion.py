"""Fused models: the same answers, the same parameters, fewer products."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured
from transformers import AutoModelForTokenClassification, PreTrainedModel

import cofiprune
from cofiprune.conformance.specimens import outputs, specimen, tiny_config
from cofiprune.inference import fusion
from cofiprune.inference.fusion import FusedLinear, Siblings
from small import Batch, batch_of, build, randomise

EXACT = 1e-12

FAMILIES = (
    "BertForTokenClassification", "RobertaForTokenClassification", "DistilBertForTokenClassification",
    "DebertaV2ForTokenClassification", "T5EncoderModel", "ViTForImageClassification",
)  # fmt: skip


@pytest.fixture
def model() -> PreTrainedModel:
    return build("BertForTokenClassification")


@pytest.fixture
def batch(model: PreTrainedModel) -> Batch:
    return batch_of(model)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the weights of the products that are computed for inference."""
    seen: list[tuple[int, ...]] = []

    def note(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(tuple(weight.shape))
        return F.linear(states, weight, bias)

    monkeypatch.setattr(fusion, "product", note)
    return seen


def tiny(name: str, **settings: Any) -> PreTrainedModel:
    cls = getattr(transformers, name)
    if name.startswith("T5"):
        settings["feed_forward_proj"] = "gated-gelu"
    config = tiny_config(cls.config_class.model_type, num_hidden_layers=3, **settings)
    return specimen(cls(config), torch.Generator().manual_seed(0))


def groups(model: nn.Module) -> list[Siblings]:
    found = {id(m.siblings): m.siblings for m in model.modules() if isinstance(m, FusedLinear) and m.siblings}
    return list(found.values())


def largest(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


@pytest.mark.parametrize("name", FAMILIES)
def test_fused_models_give_the_same_answers(name: str, products: list[tuple[int, ...]]) -> None:
    model = tiny(name)
    batch = batch_of(model)
    with cofiprune.attach(model) as masks:
        randomise(masks, fractional=True)
        masks["layers.0.heads"] = [0, 0.5, 0, 0]
        masks["layers.1.attention"] = [0]
        masks["layers.2.ffn"] = [0.5]
        masked = outputs(model, batch)
        kept = list(masks.plan().keep["hidden"])
        plain, fused = cofiprune.compact(model), cofiprune.compact(model, fuse=True)
    expected = outputs(plain, batch)
    products.clear()
    found = outputs(fused, batch)
    gated = 3 if name == "T5EncoderModel" else 0
    assert sorted(len(group.members) for group in groups(fused)) == [2] * gated + [3, 3]
    called = sum(isinstance(module, FusedLinear) for module in fused.modules())
    assert len(products) == called - 2 * 2 - gated
    scale = max(1.0, *(value.abs().max().item() for value in expected.values()))
    assert largest(expected, found) <= EXACT * scale
    law = {key: value if value.shape == found[key].shape else value[..., kept] for key, value in masked.items()}
    assert largest(law, found) <= 1e-10 * scale


def test_maps_that_run_more_than_once_stay_alone() -> None:
    shared = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": True}
    for model in (tiny("AlbertModel"), tiny("DebertaV2Model", **shared)):
        fused = cofiprune.compact(model, fuse=True)
        assert not groups(fused)
        batch = batch_of(model)
        assert largest(outputs(model, batch), outputs(fused, batch)) <= EXACT * 10


def test_parameters_are_those_of_an_ordinary_model(model: PreTrainedModel, batch: Batch, tmp_path: Path) -> None:
    with cofiprune.attach(model) as masks:
        randomise(masks, fractional=True)
        plain, fused = cofiprune.compact(model), cofiprune.compact(model, fuse=True)
    assert groups(fused)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(value, fused.state_dict()[name]) for name, value in plain.state_dict().items())
    assert cofiprune.structure(fused) == cofiprune.structure(plain)
    assert cofiprune.summary(fused).parameters == cofiprune.summary(plain).parameters
    outputs(fused, batch)
    stored = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in fused.parameters()}
    assert sum(stored.values()) == sum(value.nbytes for value in fused.parameters())  # nothing is held twice
    fused.save_pretrained(tmp_path)
    reloaded = AutoModelForTokenClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert largest(outputs(plain, batch), outputs(reloaded, batch)) <= EXACT
    assert not any(isinstance(module, FusedLinear) for module in reloaded.modules())
    again = cofiprune.compact(reloaded, fuse=True)
    assert len(groups(again)) == len(groups(fused))


def test_whole_models_can_be_stored_by_torch(model: PreTrainedModel, batch: Batch) -> None:
    fused = cofiprune.compact(model, fuse=True)
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert len(groups(loaded)) == 2
    assert largest(outputs(model, batch), outputs(loaded, batch)) <= EXACT


def _halve(model: PreTrainedModel) -> None:
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})


def _step(model: PreTrainedModel) -> None:
    torch.manual_seed(0)
    for value in model.parameters():
        value.grad = torch.ones_like(value)
    torch.optim.AdamW(model.parameters(), lr=0.1).step()


def _replace(model: PreTrainedModel) -> None:
    key = model.base_model.encoder.layer[0].attention.self.key
    key.weight = nn.Parameter(key.weight.detach() * 2)


def _data(model: PreTrainedModel) -> None:
    query = model.base_model.encoder.layer[0].attention.self.query
    query.weight.data = query.weight.data * 2


def _there_and_back(model: PreTrainedModel) -> None:
    model.to(torch.float32).to(torch.float64)


def _assign(model: PreTrainedModel) -> None:
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", [_halve, _step, _replace, _data, _there_and_back, _assign, copy.deepcopy])
def test_weights_are_never_out_of_date(
    model: PreTrainedModel, batch: Batch, change: Callable[[PreTrainedModel], Any], products: list[tuple[int, ...]]
) -> None:
    fused = cofiprune.compact(model, fuse=True)
    outputs(fused, batch)
    fused, model = change(fused) or fused, change(model) or model
    products.clear()
    with torch.inference_mode():
        found, expected = fused(**batch).logits, model(**batch).logits
    assert (found - expected).abs().max() <= EXACT * expected.abs().max()
    assert (72, 24) in products  # joint again
    assert not any(value.is_inference() for value in fused.parameters())
    fused.train()(**batch).logits.sum().backward()


def test_lower_precision_stays_joint(model: PreTrainedModel, batch: Batch, products: list[tuple[int, ...]]) -> None:
    fused = cofiprune.compact(model, fuse=True).to(torch.bfloat16)
    products.clear()
    outputs(fused, batch)
    assert products.count((72, 24)) == 2
    assert {value.dtype for value in fused.parameters()} == {torch.bfloat16}


def test_gradients_are_those_of_an_ordinary_model(model: PreTrainedModel, batch: Batch) -> None:
    fused = cofiprune.compact(model, fuse=True)
    with torch.no_grad():
        fused(**batch)
    for each in (fused, model):
        each(**batch).logits.square().sum().backward()
    expected = dict(model.named_parameters())
    for name, value in fused.named_parameters():
        torch.testing.assert_close(value.grad, expected[name].grad, rtol=1e-10, atol=1e-10)


def test_masks_on_a_fused_model_obey_the_law(model: PreTrainedModel, batch: Batch) -> None:
    fused = cofiprune.compact(model, fuse=True)
    before = outputs(fused, batch)["logits"]
    with cofiprune.attach(fused) as masks:
        assert torch.equal(outputs(fused, batch)["logits"], before)
        randomise(masks, fractional=True, blocks=True)
        masked = outputs(fused, batch)["logits"]
        for fuse in (False, True):
            small = cofiprune.compact(fused, fuse=fuse)
            assert any(isinstance(module, FusedLinear) for module in small.modules()) == fuse
            assert (outputs(small, batch)["logits"] - masked).abs().max() <= 1e-10 * max(1.0, masked.abs().max())
    assert torch.equal(outputs(fused, batch)["logits"], before)


def test_only_the_maps_that_get_the_same_tensor_take_pieces(model: PreTrainedModel) -> None:
    fused = cofiprune.compact(model, fuse=True)
    attention = fused.bert.encoder.layer[0].attention.self
    stock = model.bert.encoder.layer[0].attention.self
    one, two = torch.randn(2, 5, 24, dtype=torch.float64), torch.randn(2, 5, 24, dtype=torch.float64)
    with torch.no_grad():
        for states in (one, two, one):
            attention.query(states)
            torch.testing.assert_close(attention.key(two), stock.key(two), rtol=EXACT, atol=EXACT)
        attention.query(one)
        one.mul_(2)
        torch.testing.assert_close(attention.key(one), stock.key(one), rtol=EXACT, atol=EXACT)
        one.mul_(2)
        torch.testing.assert_close(attention.key(one), stock.key(one), rtol=EXACT, atol=EXACT)


def test_a_weight_that_is_replaced_between_siblings_is_not_overlooked(model: PreTrainedModel) -> None:
    attention = cofiprune.compact(model, fuse=True).bert.encoder.layer[0].attention.self
    states = torch.randn(2, 5, 24, dtype=torch.float64)
    with torch.no_grad():
        attention.query(states)
        expected = F.linear(states, attention.key.weight * 2, attention.key.bias)
        attention.key.weight = nn.Parameter(attention.key.weight * 2)  # as masks do for one call, or offloading
        torch.testing.assert_close(attention.key(states), expected, rtol=EXACT, atol=EXACT)


def test_nothing_is_held_after_a_pass_or_an_error(model: PreTrainedModel, batch: Batch) -> None:
    fused = cofiprune.compact(model, fuse=True)
    outputs(fused, batch)
    assert [group.pending for group in groups(fused)] == [None, None]
    attention = fused.bert.encoder.layer[0].attention.self
    states = torch.randn(2, 5, 24, dtype=torch.float64)
    with torch.no_grad():
        piece = weakref.ref(attention.query(states))
    pieces = attention.query.siblings.pending.pieces
    assert sorted(pieces) == [1, 2]
    kept = weakref.ref(next(iter(pieces.values())))
    del states, pieces
    gc.collect()
    assert piece() is None
    assert kept() is None
    assert attention.query.siblings.pending is None


def test_compiled_and_exported_programs_see_ordinary_maps(model: PreTrainedModel, batch: Batch) -> None:
    fused = cofiprune.compact(model, fuse=True)
    expected = outputs(model, batch)["logits"]
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).logits, expected, rtol=EXACT, atol=EXACT)
        program = torch.export.export(fused, (), dict(batch))
        torch.testing.assert_close(program.module()(**batch).logits, expected, rtol=EXACT, atol=EXACT)
    names = [str(node.target) for node in program.graph.nodes]
    assert sum("linear" in name for name in names) == sum(isinstance(each, nn.Linear) for each in fused.modules())


def test_models_without_made_up_inputs_keep_separate_products(
    model: PreTrainedModel, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Batch:
        raise cofiprune.errors.DataError("reads 'smells'")

    monkeypatch.setattr(fusion, "synthetic_inputs", fails)
    with pytest.warns(UserWarning, match="stay separate.*reads 'smells'"):
        fused = cofiprune.compact(model, fuse=True)
    assert not groups(fused)
    assert largest(outputs(model, batch), outputs(fused, batch)) <= EXACT


def test_modules_with_hooks_are_left_alone(model: PreTrainedModel, batch: Batch) -> None:
    key = model.bert.encoder.layer[0].attention.self.key
    key.register_forward_hook(lambda module, args, output: output * 2)
    fused = cofiprune.compact(model, fuse=True)
    assert type(fused.bert.encoder.layer[0].attention.self.key) is nn.Linear
    assert [len(group.members) for group in groups(fused)] == [2, 3]
    assert largest(outputs(model, batch), outputs(fused, batch)) <= EXACT


def test_a_map_without_bias_among_siblings(model: PreTrainedModel, batch: Batch) -> None:
    model.bert.encoder.layer[0].attention.self.key.bias = None
    fused = copy.deepcopy(model)
    fusion.fuse(fused, cofiprune.structure(fused).layers)
    assert len(groups(fused)) == 2
    assert largest(outputs(model, batch), outputs(fused, batch)) <= EXACT
    fusion.unfuse(fused)
    assert not any(isinstance(module, FusedLinear) for module in fused.modules())
    assert len({value.untyped_storage().data_ptr() for value in fused.parameters()}) == len(list(fused.parameters()))


def test_plain_models_can_be_fused(model: PreTrainedModel, batch: Batch, tmp_path: Path) -> None:
    with cofiprune.attach(model) as masks:
        for layer in range(2):
            masks[f"layers.{layer}.intermediate"] = [1] * 10 + [0] * 24
        expected = outputs(model, batch)
        small = cofiprune.compact(model, uniform=True, fuse=True)
    assert len(groups(small)) == 2
    assert largest(expected, outputs(small, batch)) <= EXACT
    assert small.config.intermediate_size == 10


def test_several_threads_may_run_one_model(model: PreTrainedModel) -> None:
    fused = cofiprune.compact(model, fuse=True)
    batches = [batch_of(model, seed) for seed in range(4)] * 10
    expected = [outputs(model, batch)["logits"] for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda batch: outputs(fused, batch)["logits"], batches))
    assert all((left - right).abs().max() <= EXACT * 10 for left, right in zip(expected, found, strict=True))


def test_a_replica_computes_with_its_own_weights(model: PreTrainedModel) -> None:
    key = cofiprune.compact(model, fuse=True).bert.encoder.layer[0].attention.self.key
    replica = key._replicate_for_data_parallel()  # as nn.DataParallel makes one for each further device
    replica.weight, replica.bias = key.weight.detach() * 2, key.bias.detach() * 2
    states = torch.randn(2, 5, 24, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(replica(states), key(states) * 2, rtol=EXACT, atol=EXACT)


def test_a_fused_model_can_be_pruned(model: PreTrainedModel) -> None:
    rows = [{"input_ids": list(range(3, 3 + size)), "labels": [0] * size} for size in range(4, 14)]
    plans = []
    for each in (cofiprune.compact(model, fuse=True), model):
        settings: dict[str, Any] = {"method": "one-shot", "finetune_epochs": 0, "target_sparsity": 0.5}
        plans.append(cofiprune.prune(each.float(), rows, progress=False, **settings).plan.kept)
    assert plans[0] == plans[1]


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("accelerated", [False, True])
def test_savers_that_look_for_shared_weights_find_none(
    model: PreTrainedModel, batch: Batch, tmp_path: Path, moved: bool, accelerated: bool
) -> None:
    fused = cofiprune.compact(model, fuse=True)
    expected = outputs(fused, batch)
    if moved:
        fused.to("cpu")  # where it is already
    if accelerated:
        Accelerator().save_model(fused, tmp_path)
    else:
        save_model(fused, str(tmp_path / "model.safetensors"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for value in other.parameters():
            value.zero_()
    load_model(other, tmp_path / "model.safetensors")
    assert largest(expected, outputs(other, batch)) <= EXACT
    state = fused.state_dict()
    for value in state.values():
        value.zero_()  # a state dict refers to the parameters themselves
    assert all(not value.any() for value in fused.parameters())
    assert not outputs(fused, batch)["logits"].any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("layers", [None, {nn.Linear}])
def test_torch_quantises_a_fused_model_like_any_other(
    model: PreTrainedModel, batch: Batch, layers: set[type[nn.Module]] | None
) -> None:
    model = model.float()
    plain, fused = (
        torch.ao.quantization.quantize_dynamic(cofiprune.compact(model, fuse=fuse), layers, dtype=torch.qint8)
        for fuse in (False, True)
    )
    assert not any(isinstance(module, nn.Linear) for module in fused.modules())
    assert largest(outputs(plain, batch), outputs(fused, batch)) <= 1e-6


def _weight_norm(key: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(key)


def _unstructured(key: nn.Module) -> None:
    l1_unstructured(key, "weight", 0.5)


@pytest.mark.parametrize("change", [_weight_norm, _unstructured])
def test_a_weight_that_comes_to_be_computed_is_read_as_it_is(
    model: PreTrainedModel, batch: Batch, change: Callable[[nn.Module], None]
) -> None:
    fused = cofiprune.compact(model, fuse=True)
    outputs(fused, batch)
    for each in (fused, model):
        change(each.bert.encoder.layer[0].attention.self.key)
    assert largest(outputs(model, batch), outputs(fused, batch)) <= EXACT * 10


def test_a_pickled_model_holds_each_weight_once(batch: Batch) -> None:
    model = build("BertForTokenClassification", hidden_size=96)
    fused = cofiprune.compact(model, fuse=True)
    outputs(fused, batch)
    assert len(pickle.dumps(fused)) < 1.05 * len(pickle.dumps(model))
    assert largest(outputs(model, batch), outputs(pickle.loads(pickle.dumps(fused)), batch)) <= EXACT * 10

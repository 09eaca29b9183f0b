"""Compacted models: ordinary models of the same class, and the one they came from is left as it was."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import cofiprune
from cofiprune.compaction.slicing import write_back
from cofiprune.conformance import specimens
from cofiprune.conformance.specimens import outputs
from cofiprune.errors import PlanError
from cofiprune.masking import masks_of
from small import Batch, batch_of, build, logits, randomise, rng


@pytest.fixture
def model() -> PreTrainedModel:
    return build("BertForMaskedLM", num_hidden_layers=3)


@pytest.fixture
def batch(model: PreTrainedModel) -> Batch:
    return batch_of(model)


def close(left: Tensor, right: Tensor, tolerance: float = 1e-10) -> bool:
    return (left - right).abs().max().item() <= tolerance * max(1.0, left.abs().max().item())


def test_an_unpruned_model_gives_an_equal_copy(model: PreTrainedModel, batch: Batch) -> None:
    small = cofiprune.compact(model)
    assert type(small) is type(model)
    assert small is not model
    assert list(small.state_dict()) == list(model.state_dict())
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in model.state_dict().items())
    storages = {value.data_ptr() for value in model.parameters()}
    assert not any(value.data_ptr() in storages for value in small.parameters())
    assert torch.equal(logits(small, batch), logits(model, batch))
    assert not hasattr(small.config, "quantization_config")


def test_the_original_is_left_as_it_was(model: PreTrainedModel, batch: Batch) -> None:
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    masks = cofiprune.attach(model)
    randomise(masks, fractional=True)
    values = {name: value.clone() for name, value in masks.items()}
    masked = logits(model, batch)
    small = cofiprune.compact(model)
    with torch.no_grad():
        for value in small.parameters():
            value.zero_()
    assert masks_of(model) is masks
    assert masks_of(small) is None
    assert all(torch.equal(masks[name], value) for name, value in values.items())
    assert torch.equal(logits(model, batch), masked)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("BertForMaskedLM", {}),
        ("RobertaForMaskedLM", {}),
        ("XLMRobertaForMaskedLM", {}),  # lists the decoder before the table that it is tied to
        ("DebertaForMaskedLM", {"embedding_size": 10}),
        ("DebertaV2ForMaskedLM", {}),
        ("BertForMaskedLM", {"tie_word_embeddings": False}),
    ],
)
def test_ties_stay_as_they_are(name: str, settings: dict[str, int], tmp_path: Path) -> None:
    model = build(name, **settings)
    with cofiprune.attach(model) as masks:
        randomise(masks, fractional=True)
        small = cofiprune.compact(model)
    small.save_pretrained(tmp_path)
    for each in (small, type(small).from_pretrained(tmp_path, dtype=torch.float64)):
        table, decoder = each.get_input_embeddings(), each.get_output_embeddings()
        assert (decoder.weight is table.weight) == settings.get("tie_word_embeddings", True)
        assert (table.embedding_dim, decoder.in_features) == (table.weight.shape[1], decoder.weight.shape[1])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_mode_dtype_and_trainability_carry_over(model: PreTrainedModel, dtype: torch.dtype, training: bool) -> None:
    model.to(dtype).train(training)
    model.cls.train(not training)
    frozen = {"bert.embeddings.word_embeddings.weight", "bert.encoder.layer.1.attention.self.query.bias"}
    for name, value in model.named_parameters():
        value.requires_grad_(name not in frozen)
    with cofiprune.attach(model) as masks:
        randomise(masks, fractional=True)
        small = cofiprune.compact(model)
    modes = [module.training for module in model.modules()]
    for each in (small, cofiprune.compact(model, fuse=True)):
        assert [module.training for module in each.modules()] == modes
    assert {value.dtype for value in small.parameters()} == {dtype}
    assert {name for name, value in small.named_parameters() if not value.requires_grad} == frozen
    assert all(value.is_contiguous() for value in small.parameters())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_the_law_holds_in_lower_precision(dtype: torch.dtype, tolerance: float) -> None:
    for name in ("BertForTokenClassification", "DebertaForTokenClassification", "DebertaV2ForTokenClassification"):
        model = build(name, dtype=dtype)
        batch = batch_of(model)
        with cofiprune.attach(model) as masks:
            randomise(masks, fractional=True)
            masked, small = logits(model, batch), cofiprune.compact(model)
            assert masked.dtype == dtype
            assert close(masked.double(), logits(small, batch).double(), tolerance)


def test_modules_agree_with_their_new_shapes() -> None:
    model = build("BertModel")
    with cofiprune.attach(model) as masks:
        masks["hidden"] = [0] * 5 + [1] * 19
        masks["layers.0.heads"] = [0, 1, 0, 1]
        masks["layers.1.intermediate"] = [1] * 7 + [0] * 27
        small = cofiprune.compact(model)
    attention = small.encoder.layer[0].attention.self
    assert (attention.num_attention_heads, attention.all_head_size, attention.attention_head_size) == (2, 12, 6)
    assert (attention.query.in_features, attention.query.out_features) == (19, 12)
    assert small.encoder.layer[1].output.dense.in_features == 7
    assert small.embeddings.LayerNorm.normalized_shape == (19,)
    assert small.embeddings.word_embeddings.embedding_dim == 19
    assert (small.config.hidden_size, small.config.num_attention_heads) == (24, 4)
    assert small.config.quantization_config["sizes"] == {
        "hidden": 19, "attention": [1, 1], "heads": [2, 4], "ffn": [1, 1], "intermediate": [34, 7],
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["BertForMaskedLM", "DebertaForTokenClassification", "DebertaV2ForTokenClassification"]
)
def test_a_compacted_model_can_be_pruned_again_and_reloaded(name: str, tmp_path: Path) -> None:
    model = build(name, num_hidden_layers=3)
    batch = batch_of(model)
    with cofiprune.attach(model) as masks:
        randomise(masks, fractional=True)
        masks["layers.1.attention"] = [0]
        model = cofiprune.compact(model)
    assert "layers.1.attention" not in cofiprune.structure(model)
    assert "layers.1.ffn" in cofiprune.structure(model)
    with cofiprune.attach(model) as masks:
        assert masks.sparsity() == 0
        randomise(masks, fractional=True, seed=1)
        masks["layers.0.ffn"] = [0]
        masked, small = logits(model, batch), cofiprune.compact(model)
        assert masks.sparsity() == 1 - layers(small) / layers(model)
    assert close(masked, logits(small, batch))
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path, dtype=torch.float64)
    assert close(masked, logits(again, batch), 1e-6)  # DeBERTa's q_bias comes back in float32
    assert dict(cofiprune.structure(again).sizes) == dict(cofiprune.structure(small).sizes)


def layers(model: PreTrainedModel) -> int:
    return sum(value.numel() for name, value in model.named_parameters() if ".encoder.layer." in name)


def test_a_plan_goes_before_attached_masks_and_serves_any_model_of_its_structure(
    model: PreTrainedModel, batch: Batch
) -> None:
    with cofiprune.attach(model) as masks:
        whole, stock = masks.plan(), logits(model, batch)
        randomise(masks, fractional=True)
        plan, masked = masks.plan(), logits(model, batch)
        assert close(logits(cofiprune.compact(model, whole), batch), stock)
    small = cofiprune.compact(model, plan)
    assert close(masked, logits(small, batch))
    other = cofiprune.compact(build("BertForMaskedLM", num_hidden_layers=3, seed=1), plan)
    assert other.num_parameters() == small.num_parameters()


def test_writing_back_is_the_inverse_of_slicing(model: PreTrainedModel, batch: Batch) -> None:
    masks = cofiprune.attach(model)
    randomise(masks)
    masks["layers.1.ffn"] = [0]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    plan, small = masks.plan(), cofiprune.compact(model)
    structure = cofiprune.structure(model)
    write_back(model, structure, small, plan)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        for value in small.parameters():
            value.mul_(1.1)
    write_back(model, structure, small, plan)
    assert close(logits(model, batch), logits(small, batch))
    gone = "bert.encoder.layer.1.intermediate.dense.weight"
    assert torch.equal(model.state_dict()[gone], weights[gone])
    masks.detach()
    with pytest.raises(PlanError, match="units in the plan and 15 in the model"):
        write_back(small, cofiprune.structure(small), small, plan)


def test_writing_back_after_fractional_masks_runs_under_the_hard_ones(model: PreTrainedModel, batch: Batch) -> None:
    masks = cofiprune.attach(model)
    randomise(masks, fractional=True)
    plan, small, masked = masks.plan(), cofiprune.compact(model), logits(model, batch)
    write_back(model, cofiprune.structure(model), small, plan)
    for name in masks:
        masks[name] = (masks[name] > 0).double()
    assert close(logits(model, batch), masked)


def test_an_attached_model_can_be_copied_and_compacted(model: PreTrainedModel, batch: Batch) -> None:
    masks = cofiprune.attach(model)
    randomise(masks, fractional=True)
    masked = logits(model, batch)
    twin = copy.deepcopy(model)
    masks.detach()
    assert close(logits(cofiprune.compact(twin), batch), masked)


@pytest.mark.parametrize("name", ["BertForTokenClassification", "DebertaV2ForTokenClassification"])
def test_gradient_checkpointing_runs_under_masks(name: str) -> None:
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = build(name, num_hidden_layers=3, **quiet).train()
    batch = batch_of(model)
    masks = cofiprune.attach(model)
    randomise(masks, fractional=True)
    masks["layers.1.attention"] = [0]
    values = {name: value.clone().requires_grad_() for name, value in masks.items()}

    def gradients() -> list[Tensor]:
        masks.bind(values)
        loss = model(**batch).logits.square().sum()
        model.zero_grad()
        found = torch.autograd.grad(loss, [*values.values(), model.classifier.weight])
        masks.unbind()
        return list(found)

    stock = gradients()
    # The older name warns in newer releases of transformers, which call it activation checkpointing.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    for with_it, without in zip(gradients(), stock, strict=True):
        torch.testing.assert_close(with_it, without, rtol=1e-8, atol=1e-8)
    small = cofiprune.compact(model)
    small(**batch).logits.sum().backward()
    assert all(value.grad is not None for name, value in small.named_parameters() if "layer.0" in name)


def test_hidden_states_and_attentions_of_a_compacted_model() -> None:
    model = build("BertModel", num_hidden_layers=3, attn_implementation="eager")
    batch = batch_of(model)
    with torch.no_grad(), cofiprune.attach(model) as masks:
        masks["hidden"] = [1] * 20 + [0] * 4
        masks["layers.1.attention"] = [0]
        masks["layers.2.heads"] = [1, 0, 0, 0]
        masked = model(**batch, output_hidden_states=True)
        small = cofiprune.compact(model)(**batch, output_hidden_states=True, output_attentions=True)
    assert len(small.hidden_states) == len(masked.hidden_states) == 4
    for left, right in zip(masked.hidden_states, small.hidden_states, strict=True):
        assert close(left[..., :20], right)
    assert [row.shape[1] for row in small.attentions if row is not None] == [4, 1]


def test_compacting_under_bound_masks_takes_the_set_ones(model: PreTrainedModel, batch: Batch) -> None:
    masks = cofiprune.attach(model)
    randomise(masks)
    expected = logits(model, batch)
    masks.bind({name: torch.ones_like(value) for name, value in masks.items()})
    assert close(logits(cofiprune.compact(model), batch), expected)


@pytest.mark.parametrize(
    "name",
    [
        "BertModel", "RobertaModel", "DistilBertModel", "ElectraModel", "DebertaModel", "DebertaV2Model", "MPNetModel",
        "ModernBertModel", "T5EncoderModel", "ViTModel", "BeitModel", "CLIPVisionModel", "EsmModel",
        "WhisperForAudioClassification",
    ],
)  # fmt: skip
def test_attentions_and_states_keep_their_layers(name: str) -> None:
    cls = getattr(transformers, name)
    settings = {"num_hidden_layers": 3, "attn_implementation": "eager"}
    model = specimens.specimen(cls(specimens.tiny_config(cls.config_class.model_type, **settings)), rng())
    batch = batch_of(model)
    with torch.no_grad(), cofiprune.attach(model) as masks:
        masks["layers.1.attention"] = [0]
        masks["layers.2.ffn"] = [0]
        for each in (model, cofiprune.compact(model)):
            found = each(**batch, output_hidden_states=True, output_attentions=True)
            assert [row is None for row in found.attentions] == [False, True, False]
            assert len(found.hidden_states) == 4


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("BertForSequenceClassification", ["dense"]),
        ("BertForSequenceClassification", None),
        ("DebertaV2ForSequenceClassification", ["dense", "query_proj"]),
        ("AlbertModel", ["ffn", "ffn_output", "full_layer_layer_norm", "pooler"]),
        ("WhisperForAudioClassification", ["fc1", "fc2", "out_proj"]),
        ("CLIPVisionModel", ["out_proj", "fc1"]),
        ("T5EncoderModel", ["o", "wo"]),
    ],
)
def test_adapters_go_to_the_projections_that_are_there(name: str, targets: list[str] | None) -> None:
    peft = pytest.importorskip("peft")
    cls = getattr(transformers, name)
    config = specimens.tiny_config(cls.config_class.model_type, num_hidden_layers=2)
    model = specimens.specimen(cls(config), rng())
    with cofiprune.attach(model) as masks:
        masks["layers.0.ffn"] = [0]
        masks[next(group for group in reversed(list(masks)) if group.endswith(".attention"))] = [0]
        small = cofiprune.compact(model)
    listed = {each for each, _ in (*small.named_parameters(remove_duplicate=False), *small.named_buffers())}
    unlisted = small.state_dict().keys() - listed  # in the place of a projection itself, which PEFT would replace
    assert not [each for each in unlisted if not each.endswith((".ffn.weight", ".fc2.weight", "embed_tokens.weight"))]
    tuned = peft.get_peft_model(small, peft.LoraConfig(target_modules=targets) if targets else peft.IA3Config())
    outputs(tuned, batch_of(small))

"""Families that nobody has declared: what is derived from a model, and that it is proved before it is used."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

import cofiprune
from cofiprune.adapter import Adapter, TableAdapter, family_entries, family_from
from cofiprune.cli import main
from cofiprune.conformance.specimens import inputs, outputs, tiny_config
from cofiprune.derivation import derive, derived_adapter
from cofiprune.derivation.derive import family_for
from cofiprune.derivation.source import written_adapter
from cofiprune.errors import AdapterError, StructureError
from cofiprune.structure import UNIT_KINDS, Structure

TWO_STAGES = {
    "num_encoder_blocks": 2, "depths": [2, 1], "hidden_sizes": [12, 18], "num_attention_heads": [2, 3],
    "sr_ratios": [2, 1], "mlp_ratios": [2, 3], "patch_sizes": [4, 2], "strides": [4, 2], "image_size": 32,
}  # fmt: skip
SWIN = {"depths": [2, 1], "num_heads": [3, 6], "embed_dim": 18, "image_size": 16}
UNDECLARED = ("tapas", "TapasForSequenceClassification")


def sides(structure: Structure) -> dict[str, object]:
    """What a structure says of each parameter: its sides without the part they play under masks, and its block."""
    return {
        spec.name: (spec.gate, [side and (side.group, side.copies, side.units, side.block) for side in spec.sides])
        for spec in structure.parameters
    }


@pytest.mark.parametrize(
    "name",
    [
        "BertForMaskedLM",
        "RobertaForTokenClassification",
        "DistilBertForSequenceClassification",
        "ElectraForQuestionAnswering",
        "XLMRobertaXLForSequenceClassification",
        "ModernBertForSequenceClassification",
        "EuroBertForMaskedLM",
        "ViTForImageClassification",
        "Dinov2ForImageClassification",
        "BeitForImageClassification",
    ],
)
def test_what_is_derived_is_what_the_declared_table_says(name: str) -> None:
    cls = getattr(transformers, name)
    model = cls(tiny_config(cls.config_class.model_type))
    declared = cofiprune.structure(model)
    family = family_for(derive(model), model.config)
    derived = TableAdapter((model.config.model_type,), family).structure(model)
    assert derived.sizes == declared.sizes
    assert derived.refused == declared.refused
    # In a head both may be right: hidden dimensions that a matrix before it wrote there can go, or stay.
    encoder = f"{model.base_model_prefix}."
    found, wanted = (
        {each: what for each, what in sides(one).items() if each.startswith(encoder)} for one in (derived, declared)
    )
    assert found == wanted
    norms = ({norm.module for norm in one.norms if norm.module.startswith(encoder)} for one in (derived, declared))
    assert next(norms) == next(norms)


def undeclared() -> PreTrainedModel:
    model_type, name = UNDECLARED
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, name)(tiny_config(model_type))
    model.train(False)
    return model


def test_an_undeclared_family_is_masked_compacted_and_reloaded(tmp_path: Path) -> None:
    model = undeclared()
    batch = inputs(model, torch.Generator().manual_seed(0))
    with cofiprune.attach(model) as masks:
        masks["layers.0.heads"] = [1, 0, 0.5, 1]
        masks["layers.1.ffn"] = [0]
        masks["hidden"] = [1] * 20 + [0] * 4
        masked = model(**batch).logits
        small = cofiprune.compact(model)
    torch.testing.assert_close(small(**batch).logits, masked, rtol=1e-5, atol=1e-5)
    small.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, small(**batch).logits)
    # The table went along: what was cut by it is read by it, whatever a later version would derive.
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["table"]
    assert family_entries(family_from(stored)) == stored
    assert isinstance(cofiprune.adapter_for(again), TableAdapter)
    once_more = cofiprune.compact(again)
    assert torch.equal(once_more(**batch).logits, small(**batch).logits)


def test_a_masked_model_whose_settings_change_is_still_known() -> None:
    model = undeclared()
    with cofiprune.attach(model) as masks:
        masks["layers.0.heads"] = [1, 0, 0.5, 1]
        model.config.problem_type = "single_label_classification"  # as a loss on labels sets it
        model.config.output_attentions = True
        assert cofiprune.summary(cofiprune.compact(model)).sparsity > 0
        model.config.problem_type = None


def test_it_is_derived_once_for_a_configuration() -> None:
    assert derived_adapter(undeclared()) is derived_adapter(undeclared())


def test_the_written_adapter_keeps_every_law(tmp_path: Path) -> None:
    file = tmp_path / "adapter.py"
    model = transformers.NystromformerForTokenClassification(tiny_config("nystromformer"))
    file.write_text(written_adapter(model))
    adapter = runpy.run_path(str(file))["adapter"]
    report = cofiprune.check_adapter(adapter, heads=("ForMaskedLM", "ForTokenClassification"), units="hidden")
    assert len(report.heads) == 2
    declared = adapter.structure(model)
    assert sides(declared) == sides(cofiprune.structure(model))


def test_what_cannot_be_sliced_exactly_is_refused_with_the_reason() -> None:
    # Its norms of queries and keys run over all heads together.
    model = transformers.EsmcModel(tiny_config("esmc"))
    structure = cofiprune.structure(model)
    assert list(structure.refused) == ["head"]
    with pytest.raises(StructureError, match=r"q_proj"):
        cofiprune.attach(model, units=("head",))


@pytest.mark.parametrize(
    ("name", "settings", "refused"),
    [
        # Two streams of states, of words and of entities.
        ("LukeModel", {}, ()),
        # Windows, tokens that see everything, and heads as wide as the input.
        ("LongformerModel", {}, ()),
        # A bias of the scores that all layers share, and an image beside the text.
        ("LayoutLMv3Model", {}, ("hidden",)),
        # Heads as wide as the input, in one matrix.
        ("BlipVisionModel", {}, ()),
        # Stages, one with shifted windows; the norms of the second stand behind the blocks.
        pytest.param("SwinModel", SWIN, ("hidden",), marks=pytest.mark.slow),
        ("Swinv2Model", {**SWIN, "depths": [1, 1]}, ("hidden",)),
        # Attention of an image to a smaller one, and feed-forwards that are convolutions too.
        pytest.param("SegformerModel", TWO_STAGES, ("hidden",), marks=pytest.mark.slow),
        # The encoder of a model with a decoder.
        ("BartEncoder", {}, ()),
    ],
)
def test_other_shapes_of_encoders_keep_every_law(
    name: str, settings: dict[str, object], refused: tuple[str, ...]
) -> None:
    cls = getattr(transformers, name, None) or transformers.models.bart.modeling_bart.BartEncoder
    torch.manual_seed(0)
    model = cls(tiny_config(cls.config_class.model_type, **settings))
    report = cofiprune.check_adapter(model, units=[unit for unit in UNIT_KINDS if unit not in refused])
    assert {name.partition(": ")[2] for name in report.refused} == set(refused)
    assert report.largest_difference < 1e-9
    assert not report.skipped


@pytest.mark.slow
def test_sizes_of_stages_are_written_down(tmp_path: Path) -> None:
    model = transformers.PvtModel(tiny_config("pvt", **{**TWO_STAGES, "sequence_reduction_ratios": [2, 1]}))
    file = tmp_path / "adapter.py"
    file.write_text(written_adapter(model))
    declared = runpy.run_path(str(file))["adapter"].structure(model)
    assert sides(declared) == sides(cofiprune.structure(model))
    assert [declared[f"layers.{layer}.heads"].size for layer in range(3)] == [2, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_that_are_as_wide_as_the_input_are_cut_again(dtype: torch.dtype, tmp_path: Path) -> None:
    model = transformers.BlipVisionModel(tiny_config("blip_vision_model")).to(dtype).eval()
    batch = inputs(model, torch.Generator().manual_seed(0))
    with cofiprune.attach(model) as masks:
        masks["layers.0.heads"] = [1, 0, 1, 1]
        once = cofiprune.compact(model)
    with cofiprune.attach(once) as masks:
        masks["layers.0.heads"] = [0, 0, 1]
        masked = outputs(once, batch)
        twice = cofiprune.compact(once)
    assert twice.encoder.layers[0].self_attn.projection.weight.shape == (24, 6)
    limit = 1e-5 if dtype == torch.float32 else 0.1
    assert float((outputs(twice, batch)["last_hidden_state"] - masked["last_hidden_state"]).abs().max()) < limit
    twice.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(outputs(again, batch)["last_hidden_state"], outputs(twice, batch)["last_hidden_state"])


class ToyConfig(PretrainedConfig):
    model_type = "derivation-toy"

    def __init__(
        self, hidden_size: int = 12, num_attention_heads: int = 3, intermediate_size: int = 20, **more: object
    ):
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = 2
        self.vocab_size = 30
        super().__init__(**more)


class ToyLayer(nn.Module):
    """A pre-norm layer with one matrix for queries, keys and values, head by head."""

    def __init__(self, config: ToyConfig, *, interleaved: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.interleaved = interleaved
        self.norm_in = nn.LayerNorm(width)
        self.attention = ToyAttention(config, interleaved=interleaved)
        self.norm_between = nn.LayerNorm(width)
        self.up = nn.Linear(width, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, width)

    def forward(self, states: Tensor) -> Tensor:
        states = states + self.attention(self.norm_in(states))
        return states + self.down(torch.relu(self.up(self.norm_between(states))))


class ToyAttention(nn.Module):
    def __init__(self, config: ToyConfig, *, interleaved: bool) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.interleaved = interleaved
        self.fused = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        batch, tokens, _ = states.shape
        fused = self.fused(states)
        if self.interleaved:
            query, key, value = fused.view(batch, tokens, self.num_heads, 3, -1).transpose(1, 2).unbind(3)
        else:
            query, key, value = (
                part.view(batch, tokens, self.num_heads, -1).transpose(1, 2) for part in fused.chunk(3, -1)
            )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        return self.out(mixed.reshape(batch, tokens, -1))


class ToyModel(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "toy"
    interleaved = False

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            ToyLayer(config, interleaved=self.interleaved) for _ in range(config.num_hidden_layers)
        )
        self.norm_out = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutput:
        states = self.embed(input_ids)
        for layer in self.layers:
            states = layer(states)
        return BaseModelOutput(last_hidden_state=self.norm_out(states))


class InterleavedToyModel(ToyModel):
    interleaved = True


@pytest.mark.parametrize("cls", [ToyModel, InterleavedToyModel])
def test_the_order_in_a_fused_matrix_is_found_by_the_law(cls: type[ToyModel]) -> None:
    model = cls(ToyConfig())
    structure = cofiprune.structure(model)
    assert not structure.refused
    assert structure.sizes["hidden"] == 12
    assert structure.sizes["layers.0.heads"] == 3
    assert structure.sizes["layers.1.intermediate"] == 20
    assert cofiprune.check_adapter(model, units="head").largest_difference < 1e-10
    fused = next(spec for spec in structure.parameters if spec.name == "layers.0.attention.fused.weight")
    side = fused.sides[0]
    assert side is not None
    assert (side.copies, side.block) == ((1, 12) if cls.interleaved else (3, 4))


class DoublingToyLayer(ToyLayer):
    def forward(self, states: Tensor) -> Tensor:
        return 2 * super().forward(states)


class UnevenToyModel(ToyModel):
    """One with a layer that does not leave the states as they are when its blocks write nothing."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.layers[1] = DoublingToyLayer(config, interleaved=False)


def test_what_cannot_be_derived_is_refused_with_what_was_found() -> None:
    with pytest.raises(AdapterError, match=r"derivation-toy.*none could be derived: .*layers\.1") as caught:
        cofiprune.structure(UnevenToyModel(ToyConfig()))
    assert "add-an-adapter.md" in str(caught.value)


class RestlessToyModel(ToyModel):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutput:
        found = super().forward(input_ids)
        return BaseModelOutput(last_hidden_state=found.last_hidden_state + torch.rand(()))


def test_a_decoder_is_told_by_its_looking_back_only() -> None:
    with pytest.raises(AdapterError, match="sees those before it only"):
        cofiprune.structure(transformers.ImageGPTModel(tiny_config("imagegpt")))


def test_an_encoder_of_text_may_look_back_only() -> None:
    assert not cofiprune.structure(transformers.XCLIPTextModel(tiny_config("xclip_text_model"))).refused


def test_a_model_that_answers_differently_each_time_is_refused() -> None:
    with pytest.raises(AdapterError, match="its outputs differ each time"):
        cofiprune.structure(RestlessToyModel(ToyConfig()))


def test_a_table_that_lies_is_not_kept(register: Callable[[Adapter], None]) -> None:
    """The proof on the model itself: a table with heads where there are none of that size."""
    model = ToyModel(ToyConfig())
    family = derived_adapter(model).describe(model.config)
    entries = family_entries(family)
    entries["attention"]["exit"] = {"module": "norm_between"}
    lie = TableAdapter(("derivation-toy",), family_from(entries))
    register(lie)
    with pytest.raises(AssertionError):
        cofiprune.check_adapter(model)


def test_inspect_says_that_it_was_derived_and_writes_the_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = transformers.SplinterModel(tiny_config("splinter"))
    model.save_pretrained(tmp_path / "model")
    assert main(["inspect", str(tmp_path / "model")]) == 0
    assert "derived from the model" in capsys.readouterr().out
    file = tmp_path / "adapter.py"
    assert main(["inspect", str(tmp_path / "model"), "--write-adapter", str(file)]) == 0
    assert '@family("splinter")' in file.read_text()
    assert main(["inspect", str(tmp_path / "model"), "--write-adapter", str(file)]) == 2
    assert outputs(model, inputs(model, torch.Generator().manual_seed(0)))

"""Encoders inside larger models: pruned where they are, put back, and saved with the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import cofiprune
from cofiprune.conformance.specimens import outputs, specimen, tiny_config
from cofiprune.errors import AdapterError, CheckpointError

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 34}
IMAGE = {**SIZES, "image_size": 8, "patch_size": 4}
TEXT = {**SIZES, "vocab_size": 40, "max_position_embeddings": 32}
PAIR = {
    "input_ids": torch.tensor([[5, 6, 3], [7, 3, 1]]),
    "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    "pixel_values": torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
}


def dual_encoder() -> PreTrainedModel:
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.ViTConfig(**IMAGE), transformers.BertConfig(**TEXT), projection_dim=10
    )
    return transformers.VisionTextDualEncoderModel(config)


def clip() -> PreTrainedModel:
    ids = {"bos_token_id": 2, "eos_token_id": 3}
    parts = {"text_config": {**TEXT, **ids}, "vision_config": IMAGE}
    return transformers.CLIPModel(transformers.CLIPConfig(**parts, projection_dim=10))


def siglip() -> PreTrainedModel:
    parts = {"text_config": {**TEXT, "projection_size": 24}, "vision_config": IMAGE}
    return transformers.SiglipModel(transformers.SiglipConfig(**parts))


def decoder() -> transformers.PretrainedConfig:
    return transformers.BertConfig(**{**TEXT, "num_hidden_layers": 1}, is_decoder=True, add_cross_attention=True)


def speech() -> PreTrainedModel:
    cls = transformers.SpeechEncoderDecoderConfig
    return transformers.SpeechEncoderDecoderModel(cls.from_encoder_decoder_configs(tiny_config("wav2vec2"), decoder()))


def captions() -> PreTrainedModel:
    cls = transformers.VisionEncoderDecoderConfig
    return transformers.VisionEncoderDecoderModel(
        cls.from_encoder_decoder_configs(transformers.ViTConfig(**IMAGE), decoder())
    )


SPEECH = {"input_values": torch.randn(2, 160, dtype=torch.float64), "decoder_input_ids": torch.tensor([[1, 2], [3, 4]])}
CAPTIONS = {"pixel_values": PAIR["pixel_values"], "decoder_input_ids": SPEECH["decoder_input_ids"]}

WHOLES: dict[str, tuple[Any, dict[str, Tensor], tuple[str, ...]]] = {
    "dual": (dual_encoder, PAIR, ("vision_model", "text_model")),
    "clip": (clip, PAIR, ("text_model", "vision_model")),
    "siglip": (siglip, {**PAIR, "input_ids": PAIR["input_ids"]}, ("text_model", "vision_model")),
    "speech": (speech, SPEECH, ("encoder",)),
    "captions": (captions, CAPTIONS, ("encoder",)),
}


@pytest.fixture(params=WHOLES)
def whole(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, dict[str, Tensor], tuple[str, ...]]:
    """A model of several in float64, its inputs and the paths of its encoders."""
    make, batch, parts = WHOLES[request.param]
    return specimen(make(), torch.Generator().manual_seed(0)), batch, parts


def answer(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    found = outputs(model, batch)
    return found["logits_per_image"] if "logits_per_image" in found else found["logits"]


def test_the_whole_is_refused_and_its_encoders_are_named(whole: Any) -> None:
    model, _, parts = whole
    with pytest.raises(AdapterError, match=rf"Pass model\.{parts[0]} \(\w+\)") as error:
        cofiprune.prune(model, target_sparsity=0.5)
    assert all(f"model.{part}" in str(error.value) for part in parts)
    assert "\n" not in str(error.value)


def test_a_part_is_cut_in_its_place_and_saved_with_the_whole(whole: Any, tmp_path: Path) -> None:
    model, batch, parts = whole
    for part in parts:
        encoder = model.get_submodule(part)
        with cofiprune.attach(encoder, ("layer", "head", "intermediate")) as masks:
            masks["layers.0.attention"] = [0]
            masks["layers.1.heads"] = [1, 0, 0.5, 1]
            masks["layers.1.intermediate"] = torch.arange(34) % 2
            masked = answer(model, batch)
            small = cofiprune.compact(encoder)
        model.set_submodule(part, small)
        assert torch.allclose(answer(model, batch), masked, atol=1e-10)
    cofiprune.record_parts(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.allclose(answer(loaded, batch), masked, atol=1e-10)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    built = type(model)._from_config(type(loaded.config).from_pretrained(tmp_path))
    assert {name: value.shape for name, value in built.state_dict().items()} == shapes
    # And once more: what was loaded is an ordinary model, whose parts know their sizes.
    again = loaded.get_submodule(parts[0])
    assert cofiprune.structure(again)["layers.1.intermediate"].size == 17
    loaded.save_pretrained(tmp_path / "again")
    twice = type(model).from_pretrained(tmp_path / "again", dtype=torch.float64).eval()
    assert torch.allclose(answer(twice, batch), masked, atol=1e-10)


def test_what_cannot_be_recorded_says_why() -> None:
    model = dual_encoder()
    with pytest.raises(CheckpointError, match="no model inside VisionTextDualEncoderModel is compacted"):
        cofiprune.record_parts(model)
    with cofiprune.attach(model.vision_model, "hidden") as masks:
        masks["hidden"] = torch.arange(24) < 20
        model.vision_model = cofiprune.compact(model.vision_model)
    with pytest.raises(CheckpointError, match="20 of 24 hidden dimensions left.*Leave 'hidden' out of units"):
        cofiprune.record_parts(model)
    with pytest.raises(CheckpointError, match="ViTModel is compacted itself"):
        cofiprune.record_parts(model.vision_model)


def test_a_whole_with_parts_of_other_sizes_does_not_load_without_the_record(tmp_path: Path) -> None:
    model = dual_encoder()
    with cofiprune.attach(model.text_model, "head") as masks:
        masks["layers.0.heads"] = [1, 0, 1, 1]
        model.text_model = cofiprune.compact(model.text_model)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch|shapes"):
        type(model).from_pretrained(tmp_path)


def test_a_part_is_pruned_to_a_target() -> None:
    model = dual_encoder()
    with pytest.warns(UserWarning, match="without data|No data|no data"):
        result = cofiprune.prune(
            model.text_model, target_sparsity=0.5, units=("head", "intermediate"), seed=0, progress=False
        )
    model.text_model = result.compact()
    assert abs(result.sparsity - 0.5) <= 0.02
    assert answer(model.double().eval(), PAIR).shape == (2, 2)


class Headed(transformers.PreTrainedModel):
    """A class of one's own around an encoder, with a reader of its states that nobody has described."""

    config_class = transformers.EncoderDecoderConfig  # any configuration of several

    def __init__(self, config: Any, encoder: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.encoder = encoder or transformers.AutoModel.from_config(config.encoder)
        self.score = torch.nn.Linear(24, 3)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **options: Any) -> Any:
        states = self.encoder(input_ids, attention_mask, **options)
        logits = self.score(states.last_hidden_state[:, 0])
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return transformers.modeling_outputs.SequenceClassifierOutput(loss, logits, states.hidden_states)


def headed() -> PreTrainedModel:
    config = transformers.BertConfig(**TEXT)
    return Headed(transformers.EncoderDecoderConfig(encoder=config.to_dict(), decoder=config.to_dict(), num_labels=3))


def on_a_tower(family: str, **settings: Any) -> PreTrainedModel:
    cls = getattr(transformers, f"{family}ForImageClassification")
    return cls(cls.config_class(vision_config={**IMAGE, **settings}, text_config=TEXT, num_labels=3))


PIXELS = {"pixel_values": PAIR["pixel_values"]}
WORDS = {name: PAIR[name] for name in ("input_ids", "attention_mask")}
HEADS: dict[str, tuple[Any, dict[str, Tensor], str, bool]] = {
    "clip": (lambda: on_a_tower("CLIP"), PIXELS, "vision_model", True),
    "metaclip": (lambda: on_a_tower("MetaClip2"), PIXELS, "vision_model", True),
    "siglip": (lambda: on_a_tower("Siglip"), PIXELS, "vision_model", False),
    "siglip, means": (
        lambda: on_a_tower("Siglip", vision_use_head=False),
        PIXELS,
        "vision_model",
        True,
    ),
    "one's own": (headed, WORDS, "encoder", False),
}


@pytest.fixture(params=HEADS)
def head(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, dict[str, Tensor], str, bool]:
    """A head on one encoder in float64, its inputs, the encoder's path, and whether hidden dimensions can go."""
    make, batch, path, wide = HEADS[request.param]
    return specimen(make(), torch.Generator().manual_seed(0)), batch, path, wide


def test_a_head_on_one_encoder_is_pruned_as_a_whole(head: Any, tmp_path: Path) -> None:
    model, batch, path, wide = head
    structure = cofiprune.structure(model)
    assert ("hidden" in structure) == wide
    assert {layer.partition(".")[0] for layer in structure.layers} == {path}
    with cofiprune.attach(model) as masks:
        masks["layers.0.attention"] = [0]
        masks["layers.1.heads"] = [1, 0, 0.5, 1]
        masks["layers.1.intermediate"] = torch.arange(34) % 2
        if wide:
            masks["hidden"] = torch.arange(24) % 5 > 0
        masked = answer(model, batch)
        small = cofiprune.compact(model)
    assert torch.allclose(answer(small, batch), masked, atol=1e-10)
    small.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.allclose(answer(loaded, batch), masked, atol=1e-10)
    assert cofiprune.structure(loaded)["layers.1.intermediate"].size == 17
    summary = cofiprune.summary(loaded)
    assert summary.state == "compacted"
    assert summary.sparsity > 0
    with cofiprune.attach(loaded, "head") as masks:  # and once more
        masks["layers.1.heads"] = [1, 0, 1]
        again, masked = cofiprune.compact(loaded), answer(loaded, batch)
    again.save_pretrained(tmp_path / "again")
    twice = type(model).from_pretrained(tmp_path / "again", dtype=torch.float64).eval()
    assert torch.allclose(answer(twice, batch), masked, atol=1e-10)


def test_the_configuration_of_a_whole_states_the_sizes_of_its_encoder(head: Any, tmp_path: Path) -> None:
    model, batch, path, wide = head
    with cofiprune.attach(model) as masks:
        masks["layers.0.attention"] = masks["layers.0.ffn"] = [0]
        for name in masks:
            if name.endswith("intermediate"):
                masks[name] = torch.arange(34) % 2
        masked, plan = answer(model, batch), masks.plan()
    if not wide:
        expected = f"prune model.{path} by itself" if path == "encoder" else "cannot state smaller sizes"
        with pytest.raises(cofiprune.CofipruneError, match=f"{expected}.*leave out uniform"):
            cofiprune.compact(model, plan, uniform=True)
        return
    small = cofiprune.compact(model, plan, uniform=True)
    small.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    for each in (small, loaded):
        assert torch.allclose(answer(each, batch), masked, atol=1e-10)
        assert each.get_submodule(path).config.intermediate_size == 17


@pytest.mark.parametrize("how", [{"method": "cofi"}, {"method": "one-shot"}])
def test_a_head_on_one_encoder_is_trained_towards_a_target(head: Any, how: dict[str, Any]) -> None:
    model, batch = head[0].float(), head[1]
    batch = {name: each.float() if each.is_floating_point() else each for name, each in batch.items()}
    rows = [{**{name: each[at % 2] for name, each in batch.items()}, "labels": at % 3} for at in range(24)]
    quick = {"epochs": 2, "finetune_epochs": 1, "batch_size": 8, "progress": False}
    result = cofiprune.prune(model, rows, target_sparsity=0.5, teacher="self", eval_dataset=rows, **quick, **how)
    assert abs(result.sparsity - 0.5) <= 0.005
    assert result.compact()(**batch).logits.shape == (2, 3)
    assert "eval_loss" in result.metrics


def test_a_part_that_was_pruned_before_its_whole_keeps_its_sizes(head: Any, tmp_path: Path) -> None:
    model, batch, path, _ = head
    with cofiprune.attach(getattr(model, path), ("layer", "head")) as masks:
        masks["layers.0.attention"] = [0]
        setattr(model, path, cofiprune.compact(getattr(model, path)))
    assert "layers.0.attention" not in cofiprune.structure(model)
    with cofiprune.attach(model) as masks:
        masks["layers.1.heads"] = [1, 0, 0, 1]
        small, masked = cofiprune.compact(model), answer(model, batch)
    small.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.allclose(answer(loaded, batch), masked, atol=1e-10)

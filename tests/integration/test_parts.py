"""Encoders inside larger models: pruned where they are, put back, and saved with the whole."""

from __future__ import annotations

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

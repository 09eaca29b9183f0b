"""The law for the families that read images or sound, and for the text encoders that come in a pair with one.

Like the tests of the text families, with fewer masks: a masked model is its compacted self, in memory and from a file.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

import cofiprune
from cofiprune import accounting
from cofiprune.conformance import specimens
from cofiprune.conformance.calls import compared, largest
from cofiprune.errors import StructureError

# Their eager attention rounds to float32; the default does not.
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 34}
IMAGE = {**SIZES, "image_size": 8, "patch_size": 4}
SOUND = {
    **SIZES,
    "vocab_size": 40,
    "conv_dim": (6, 6),
    "conv_kernel": (4, 3),
    "conv_stride": (2, 2),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "tdnn_dim": (8, 8, 8, 8, 12),
}
TEXT = {**SIZES, "vocab_size": 40, "max_position_embeddings": 32, "bos_token_id": 2, "eos_token_id": 3}

# WavLM gives torch a mask of booleans beside a bias of numbers.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")

# Name of the case: configuration class, settings, classes, and the unit kinds that it refuses.
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any], str, tuple[str, ...]]] = {
    "vit": (
        "ViTConfig",
        {**IMAGE, "encoder_stride": 4},
        "ViT{Model,ForImageClassification,ForMaskedImageModeling}",
        (),
    ),
    "deit": (
        "DeiTConfig",
        {**IMAGE, "encoder_stride": 4},
        "DeiT{Model,ForImageClassification,ForImageClassificationWithTeacher,ForMaskedImageModeling}",
        (),
    ),
    "vit-msn": ("ViTMSNConfig", IMAGE, "ViTMSN{Model,ForImageClassification}", ()),
    "ijepa": ("IJepaConfig", IMAGE, "IJepa{Model,ForImageClassification}", ()),
    "dinov2": ("Dinov2Config", {**IMAGE, "mlp_ratio": 2}, "Dinov2{Model,ForImageClassification,Backbone}", ()),
    "dinov2-gated": ("Dinov2Config", {**IMAGE, "use_swiglu_ffn": True}, "Dinov2{Model,ForImageClassification}", ()),
    "dinov2-with-registers": (
        "Dinov2WithRegistersConfig",
        {**IMAGE, "num_register_tokens": 3},
        "Dinov2WithRegisters{Model,ForImageClassification,Backbone}",
        (),
    ),
    "beit": (
        "BeitConfig",
        {**IMAGE, "use_mask_token": True, "vocab_size": 40},
        "Beit{Model,ForImageClassification,ForMaskedImageModeling}",
        (),
    ),
    "beit-biased": (
        "BeitConfig",
        {**IMAGE, "use_relative_position_bias": True, "use_absolute_position_embeddings": True},
        "Beit{Model,ForImageClassification}",
        (),
    ),
    "beit-class-token": (
        "BeitConfig",
        {**IMAGE, "use_mean_pooling": False, "layer_scale_init_value": 0.0},
        "Beit{Model,ForImageClassification}",
        (),
    ),
    "beit-shared": ("BeitConfig", {**IMAGE, "use_shared_relative_position_bias": True}, "BeitModel", ("head",)),
    "data2vec-vision": (
        "Data2VecVisionConfig",
        {**IMAGE, "use_relative_position_bias": True, "use_absolute_position_embeddings": True},
        "Data2VecVision{Model,ForImageClassification}",
        (),
    ),
    "beit-backbone": ("BeitConfig", IMAGE, "BeitBackbone", ("hidden",)),
    "clip-vision": ("CLIPVisionConfig", {**IMAGE, "projection_dim": 10}, "CLIPVisionModel{,WithProjection}", ()),
    "clip-text": ("CLIPTextConfig", {**TEXT, "projection_dim": 10}, "CLIPTextModel{,WithProjection}", ()),
    "metaclip-2-vision": (
        "MetaClip2VisionConfig",
        {**IMAGE, "projection_dim": 10},
        "MetaClip2VisionModel{,WithProjection}",
        (),
    ),
    "metaclip-2-text": (
        "MetaClip2TextConfig",
        {**TEXT, "projection_dim": 10},
        "MetaClip2TextModel{,WithProjection}",
        (),
    ),
    "siglip-vision": ("SiglipVisionConfig", IMAGE, "SiglipVisionModel", ("hidden",)),
    "siglip-vision-plain": ("SiglipVisionConfig", {**IMAGE, "vision_use_head": False}, "SiglipVisionModel", ()),
    "siglip-text": ("SiglipTextConfig", {**TEXT, "projection_size": 10}, "SiglipTextModel", ()),
    "siglip2-vision": ("Siglip2VisionConfig", {**IMAGE, "num_patches": 4}, "Siglip2VisionModel", ("hidden",)),
    "siglip2-vision-plain": (
        "Siglip2VisionConfig",
        {**IMAGE, "num_patches": 4, "vision_use_head": False},
        "Siglip2VisionModel",
        (),
    ),
    "siglip2-text": ("Siglip2TextConfig", {**TEXT, "projection_size": 10}, "Siglip2TextModel", ()),
    "ast": (
        "ASTConfig",
        {**SIZES, "num_mel_bins": 8, "max_length": 16, "patch_size": 4, "frequency_stride": 3, "time_stride": 3},
        "AST{Model,ForAudioClassification}",
        (),
    ),
    # Not for pretraining: its perplexity of codes is rounded to float32.
    "wav2vec2": (
        "Wav2Vec2Config",
        SOUND,
        "Wav2Vec2{Model,ForCTC,ForSequenceClassification,ForAudioFrameClassification,ForXVector}",
        ("hidden",),
    ),
    "wav2vec2-stable": (
        "Wav2Vec2Config",
        {**SOUND, "do_stable_layer_norm": True, "feat_extract_norm": "layer"},
        "Wav2Vec2{Model,ForCTC}",
        ("hidden",),
    ),
    "hubert": ("HubertConfig", SOUND, "Hubert{Model,ForCTC,ForSequenceClassification}", ("hidden",)),
    "hubert-stable": ("HubertConfig", {**SOUND, "do_stable_layer_norm": True}, "HubertModel", ("hidden",)),
    "data2vec-audio": (
        "Data2VecAudioConfig",
        {**SOUND, "conv_pos_kernel_size": 3},
        "Data2VecAudio{Model,ForCTC,ForSequenceClassification,ForAudioFrameClassification,ForXVector}",
        ("hidden",),
    ),
    "wav2vec2-language": (
        "Wav2Vec2Config",
        {**SOUND, "do_stable_layer_norm": True, "adapter_attn_dim": 5},
        "Wav2Vec2Model",
        ("hidden",),
    ),
    "unispeech": ("UniSpeechConfig", SOUND, "UniSpeech{Model,ForCTC}", ("hidden",)),
    "unispeech-sat": ("UniSpeechSatConfig", SOUND, "UniSpeechSat{Model,ForXVector}", ("hidden",)),
    "sew": ("SEWConfig", SOUND, "SEW{Model,ForCTC}", ("hidden",)),
    "wavlm": ("WavLMConfig", SOUND, "WavLM{Model,ForCTC}", ("hidden", "head")),
    "wavlm-stable": (
        "WavLMConfig",
        {**SOUND, "do_stable_layer_norm": True, "feat_extract_norm": "layer", "num_hidden_layers": 3},
        "WavLMModel",
        ("hidden", "head"),
    ),
    "wav2vec2-conformer": ("Wav2Vec2ConformerConfig", SOUND, "Wav2Vec2Conformer{Model,ForXVector}", ()),
    "wav2vec2-conformer-adapter": (
        "Wav2Vec2ConformerConfig",
        {**SOUND, "position_embeddings_type": None, "add_adapter": True, "num_adapter_layers": 1},
        "Wav2Vec2ConformerModel",
        (),
    ),
    "wav2vec2-bert": (
        "Wav2Vec2BertConfig",
        SOUND,
        "Wav2Vec2Bert{Model,ForCTC,ForSequenceClassification,ForAudioFrameClassification}",
        (),
    ),
    "wav2vec2-bert-adapter": (
        "Wav2Vec2BertConfig",
        {
            **SOUND,
            "position_embeddings_type": "relative",
            "add_adapter": True,
            "use_intermediate_ffn_before_adapter": True,
            "output_hidden_size": 20,
        },
        "Wav2Vec2BertModel",
        (),
    ),
    "whisper": (
        "WhisperConfig",
        {
            "d_model": 24,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 34,
            "num_mel_bins": 8,
            "max_source_positions": 8,
            "classifier_proj_size": 10,
        },
        "WhisperForAudioClassification",
        ("hidden",),
    ),
}

OTHERWISE = (
    "siglip-vision",  # its pooling head is not described and counted once for each image
    "siglip2-vision",
    "siglip2-vision-plain",  # how it stretches its positions is not counted
    "sew",  # its layers have fewer rows than come out
    "wav2vec2-conformer-adapter",
    "wav2vec2-bert-adapter",
)
"""What PyTorch counts otherwise."""


@functools.cache
def specimen(family: str, name: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A random model and its inputs."""
    config, settings, *_ = FAMILIES[family]
    generator = torch.Generator().manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**settings))
    model = specimens.specimen(model, generator)
    return model, specimens.inputs(model, generator)


def models() -> Iterator[Any]:
    """Every family with every of its classes."""
    for family, (_, _, classes, _) in FAMILIES.items():
        for name in cofiprune.adapter.expand(classes):
            yield pytest.param(family, name, id=f"{family}-{name}")


@pytest.mark.parametrize(("family", "name"), list(models()))
def test_masked_model_is_its_compacted_self(family: str, name: str, tmp_path: Path) -> None:
    model, batch = specimen(family, name)
    refused = FAMILIES[family][3]
    structure = cofiprune.structure(model)
    assert tuple(structure.refused) == refused
    kinds = [unit for unit in ("layer", "head", "intermediate", "hidden") if unit not in refused]
    generator = torch.Generator().manual_seed(1)
    stock = specimens.outputs(model, batch)
    for choice in (*((kind,) for kind in kinds), tuple(kinds)):
        for fractional in (False, True):
            with cofiprune.attach(model, choice) as masks:
                for group in masks:
                    masks[group] = specimens.random_values(len(masks[group]), generator, fractional=fractional)
                masked = specimens.outputs(model, batch)
                small = cofiprune.compact(model)
                sparsity, plan = masks.sparsity(), masks.plan()
            cut = specimens.outputs(small, batch)
            assert compared(masked, cut, plan) <= 1e-10
            layers = tuple(structure.layers)
            before, after = (
                sum(value.numel() for key, value in each.named_parameters() if key.startswith(layers))
                for each in (model, small)
            )
            assert sparsity == 1 - after / before
    small.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert largest(cut, specimens.outputs(loaded, batch)) <= 1e-10
    again = specimens.outputs(model, batch)
    assert all(torch.equal(again[key], value) for key, value in stock.items())


@pytest.mark.parametrize(("family", "name"), [each for each in models() if FAMILIES[each.values[0]][3]])
def test_refused_units_say_why(family: str, name: str) -> None:
    model, _ = specimen(family, name)
    for unit in FAMILIES[family][3]:
        with pytest.raises(StructureError, match=f"cannot prune '{unit}' units: .{{20}}"):
            cofiprune.attach(model, unit)


@pytest.mark.parametrize(
    "family", [family for family, case in FAMILIES.items() if "Model" in case[2] and family not in OTHERWISE]
)
def test_operations_are_those_that_pytorch_counts(family: str) -> None:
    config, settings, classes, _ = FAMILIES[family]
    name = next(name for name in cofiprune.adapter.expand(classes) if name.endswith("Model"))
    eager = getattr(transformers, config)(**settings, attn_implementation="eager")
    model = getattr(transformers, name)(eager).eval()
    # One example: what a conformer makes of its distances is the same for all of a batch.
    batch = {key: row[:1] for key, row in specimens.inputs(model, torch.Generator().manual_seed(0)).items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        rows = model(**batch).last_hidden_state.shape[1]
    counted = accounting.model_macs(structure := cofiprune.structure(model), rows).exact(structure.sizes)
    assert counted * 2 == counter.get_total_flops()


def test_parts_of_a_pair_are_pruned_one_by_one() -> None:
    config = transformers.CLIPConfig(
        text_config={**TEXT, "projection_dim": 10}, vision_config={**IMAGE, "projection_dim": 10}, projection_dim=10
    )
    model = specimens.specimen(transformers.CLIPModel(config), torch.Generator().manual_seed(0))
    batch = {
        "input_ids": torch.tensor([[5, 6, 3], [7, 3, 1]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "pixel_values": torch.randn(2, 3, 8, 8, dtype=torch.float64),
    }
    with torch.no_grad():
        with (
            cofiprune.attach(model.vision_model, ("layer", "head")) as vision,
            cofiprune.attach(model.text_model, ("head", "intermediate")) as text,
        ):
            vision["layers.1.attention"] = [0]
            vision["layers.0.heads"] = [1, 0, 0.5, 1]
            text["layers.1.intermediate"] = torch.arange(34) % 2
            masked = model(**batch).logits_per_image
            parts = cofiprune.compact(model.vision_model), cofiprune.compact(model.text_model)
        model.vision_model, model.text_model = parts
        assert torch.allclose(model(**batch).logits_per_image, masked, atol=1e-10)

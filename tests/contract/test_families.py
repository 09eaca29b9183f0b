"""The battery for every family, head class by head class, and what a family refuses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

import cofiprune
from cofiprune import accounting
from cofiprune.adapter import expand
from cofiprune.conformance import specimens
from cofiprune.conformance.calls import compared
from cofiprune.errors import StructureError
from cofiprune.structure import UNIT_KINDS
from small import rng

# WavLM gives torch a mask of booleans beside a bias of numbers.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")


class Case(NamedTuple):
    """A family as it is configured somewhere."""

    model_type: str
    settings: Mapping[str, Any] = {}
    """In addition to the small sizes."""
    heads: tuple[str, ...] | str | None = None
    """Endings of the head classes, or the names of classes; None for all."""
    refused: tuple[str, ...] = ()
    """Unit kinds."""


RELATIVE = {"relative_attention": True, "pos_att_type": "c2p|p2c", "position_biased_input": False}
SHARED_KEYS = {**RELATIVE, "position_buckets": 4, "norm_rel_ebd": "layer_norm", "share_att_key": True}
NARROW = {"relative_attention": True, "embedding_size": 10}
ENGLISH = {"default_language": "en_XX"}
ROC = {"pronunciation_vocab_size": 30, "pronunciation_embed_dim": 10, "shape_vocab_size": 30, "shape_embed_dim": 11}
ADDED = {"concat_input": False, "pronunciation_embed_dim": 24, "shape_embed_dim": 24}
SOME = ("Model", "ForMaskedLM")
THREE = (*SOME, "ForSequenceClassification")

BIASED = {"use_relative_position_bias": True, "use_absolute_position_embeddings": True}
ENDS = {"bos_token_id": 2, "eos_token_id": 3}
TDNN = {"tdnn_dim": (8, 8, 8, 8, 12)}
STABLE = {"do_stable_layer_norm": True}
LONG = {"max_source_positions": 5000}
ADAPTER = {
    "position_embeddings_type": "relative", "add_adapter": True, "use_intermediate_ffn_before_adapter": True,
    "output_hidden_size": 20,
}  # fmt: skip
IMAGES = ("Model", "ForImageClassification")
CTC = ("Model", "ForCTC")
SOUNDS = (*CTC, "ForSequenceClassification", "ForAudioFrameClassification", "ForXVector")

# Encoders of text.
TEXT: Mapping[str, Case] = {
    "bert": Case("bert"),
    "bert-eager-untied": Case("bert", {"attn_implementation": "eager", "tie_word_embeddings": False}, ("ForMaskedLM",)),
    "roberta": Case("roberta"),
    "xlm-roberta": Case("xlm-roberta"),
    "camembert": Case("camembert"),
    "deberta": Case("deberta", RELATIVE),
    "deberta-absolute": Case("deberta", {"type_vocab_size": 2}, THREE),
    "deberta-narrow": Case("deberta", {**NARROW, "pos_att_type": ["p2c"]}, THREE),
    "deberta-enhanced": Case("deberta", {**RELATIVE, "legacy": False, "max_relative_positions": 4}, ("ForMaskedLM",)),
    "deberta-talking": Case(
        "deberta", {**RELATIVE, "talking_head": True}, ("ForTokenClassification",), refused=("head",)),
    # As microsoft/deberta-v3-base.
    "deberta-v3": Case("deberta-v2", {**SHARED_KEYS, "legacy": False}),
    # As microsoft/deberta-v2-xlarge.
    "deberta-v2-conv": Case(
        "deberta-v2", {**SHARED_KEYS, "conv_kernel_size": 3, "conv_act": "gelu", "attention_head_size": 6}, THREE),
    "deberta-v2-separate": Case("deberta-v2", {**RELATIVE, "type_vocab_size": 2}, THREE),
    "deberta-v2-narrow": Case("deberta-v2", {**NARROW, "pos_att_type": "c2p", "position_biased_input": True}, THREE),
    "deberta-v2-grouped": Case(
        "deberta-v2", {**RELATIVE, "conv_kernel_size": 3, "conv_groups": 2}, ("ForTokenClassification",),
        refused=("hidden",)),
    "electra": Case("electra"),
    # As google/electra-small-discriminator, and a summary without a projection.
    "electra-narrow": Case(
        "electra", {"embedding_size": 10, "summary_use_proj": False},
        ("Model", "ForMaskedLM", "ForPreTraining", "ForMultipleChoice")),
    "distilbert": Case("distilbert"),
    "distilbert-untied": Case("distilbert", {"tie_word_embeddings": False}, ("ForMaskedLM",)),
    "mpnet": Case("mpnet"),
    "ernie": Case("ernie"),
    "ernie-tasks": Case("ernie", {"use_task_id": True}, SOME),
    "roc_bert": Case("roc_bert", ROC),
    "roc_bert-added": Case("roc_bert", {**ROC, **ADDED}, SOME),
    "layoutlm": Case("layoutlm"),
    "megatron-bert": Case("megatron-bert"),
    "roberta-prelayernorm": Case("roberta-prelayernorm"),
    "xlm-roberta-xl": Case("xlm-roberta-xl"),
    "data2vec-text": Case("data2vec-text"),
    "rembert": Case("rembert", {"input_embedding_size": 10, "output_embedding_size": 14}),
    "roformer": Case("roformer"),
    "roformer-narrow": Case("roformer", {"embedding_size": 10, "rotary_value": True}, SOME),
    "xmod": Case("xmod", {**ENGLISH, "languages": ["de_DE", "en_XX"]}),
    # As facebook/xmod-base, but for the sizes and languages.
    "xmod-adapter-norm": Case("xmod", {**ENGLISH, "adapter_layer_norm": True, "ln_before_adapter": False}, SOME),
    "xmod-bare": Case("xmod", {**ENGLISH, "adapter_reuse_layer_norm": False}, SOME),
    "xmod-pre-norm": Case("xmod", {**ENGLISH, "pre_norm": True}, SOME),
    # A window of 4 tokens: the second of three layers attends locally.
    "modernbert": Case("modernbert", {"num_hidden_layers": 3, "local_attention": 4}),
    "modernbert-biased": Case(
        "modernbert", {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_pooling": "mean"},
        ("ForMaskedLM", "ForSequenceClassification")),
    "modernbert-untied": Case("modernbert", {"tie_word_embeddings": False}, ("ForMaskedLM",)),
    "albert": Case("albert", {"embedding_size": 10}),
    "albert-groups": Case(
        "albert", {"embedding_size": 10, "num_hidden_layers": 3, "num_hidden_groups": 2, "inner_group_num": 2},
        ("ForTokenClassification",)),
    # As facebook/esm2_t6_8M_UR50D.
    "esm": Case("esm", {"position_embedding_type": "rotary", "token_dropout": True, "mask_token_id": 3}),
    # As facebook/esm1b_t33_650M_UR50S.
    "esm-absolute": Case("esm", {"emb_layer_norm_before": True}, ("Model", "ForMaskedLM")),
    "nomic": Case("nomic_bert"),
    "gte": Case("gte"),
    "jina": Case("jina_embeddings_v3"),
    "gte-no-types": Case("gte", {"type_vocab_size": 0}, ("Model",)),
    # Four query heads that share two pairs of keys and values.
    "eurobert": Case("eurobert", {"num_key_value_heads": 2}),
    "eurobert-tied": Case(
        "eurobert",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "classifier_pooling": "mean"},
        ("ForMaskedLM", "ForSequenceClassification")),
    # As t5-small; three layers, so that the first layer's table serves two others.
    "t5": Case("t5", {"num_layers": 3}, ("EncoderModel", "ForTokenClassification")),
    # As t5-v1_1-small.
    "t5-gated": Case("t5", {"feed_forward_proj": "gated-gelu"}, ("EncoderModel",)),
    "mt5": Case("mt5", {}, ("EncoderModel",)),
    "umt5": Case("umt5", {}, ("EncoderModel", "ForTokenClassification")),
}  # fmt: skip
# Encoders of images and sound, and those of text that come in a pair with one.
OTHERS: Mapping[str, Case] = {
    "vit": Case("vit"),
    "deit": Case("deit"),
    "vit-msn": Case("vit_msn"),
    "ijepa": Case("ijepa"),
    "dinov2": Case("dinov2", {"mlp_ratio": 2}),
    "dinov2-gated": Case("dinov2", {"use_swiglu_ffn": True}),
    "dinov2-with-registers": Case("dinov2_with_registers", {"num_register_tokens": 3}),
    "beit": Case("beit", {"use_mask_token": True}, "Beit{Model,ForImageClassification,ForMaskedImageModeling}"),
    "beit-biased": Case("beit", BIASED, IMAGES),
    "beit-class-token": Case("beit", {"use_mean_pooling": False, "layer_scale_init_value": 0.0}, IMAGES),
    "beit-shared": Case("beit", {"use_shared_relative_position_bias": True}, ("Model",), refused=("head",)),
    "beit-backbone": Case("beit", {}, ("Backbone",), refused=("hidden",)),
    "data2vec-vision": Case("data2vec-vision", BIASED, IMAGES),
    "clip-vision": Case("clip_vision_model", {"projection_dim": 10}, "CLIPVisionModel{,WithProjection}"),
    "clip-text": Case("clip_text_model", {**ENDS, "projection_dim": 10}, "CLIPTextModel{,WithProjection}"),
    "metaclip-2-vision": Case("metaclip_2_vision_model", {"projection_dim": 10}),
    "metaclip-2-text": Case("metaclip_2_text_model", {**ENDS, "projection_dim": 10}),
    "siglip-vision": Case("siglip_vision_model", {}, refused=("hidden",)),
    "siglip-vision-plain": Case("siglip_vision_model", {"vision_use_head": False}),
    "siglip-text": Case("siglip_text_model", {**ENDS, "projection_size": 10}),
    "siglip2-vision": Case("siglip2_vision_model", {"num_patches": 4}, refused=("hidden",)),
    "siglip2-vision-plain": Case("siglip2_vision_model", {"num_patches": 4, "vision_use_head": False}),
    "siglip2-text": Case("siglip2_text_model", {**ENDS, "projection_size": 10}),
    "ast": Case("audio-spectrogram-transformer", {"frequency_stride": 3, "time_stride": 3}),
    # Not for pretraining: its perplexity of codes is rounded to float32.
    "wav2vec2": Case("wav2vec2", TDNN, SOUNDS, refused=("hidden",)),
    "wav2vec2-stable": Case("wav2vec2", {**STABLE, "feat_extract_norm": "layer"}, CTC, refused=("hidden",)),
    "wav2vec2-language": Case("wav2vec2", {**STABLE, "adapter_attn_dim": 5}, ("Model",), refused=("hidden",)),
    "hubert": Case("hubert", {}, refused=("hidden",)),
    "hubert-stable": Case("hubert", STABLE, ("Model",), refused=("hidden",)),
    "data2vec-audio": Case("data2vec-audio", {**TDNN, "conv_pos_kernel_size": 3}, refused=("hidden",)),
    "unispeech": Case("unispeech", {}, CTC, refused=("hidden",)),
    "unispeech-sat": Case("unispeech-sat", TDNN, ("Model", "ForXVector"), refused=("hidden",)),
    "sew": Case("sew", {}, CTC, refused=("hidden",)),
    "wavlm": Case("wavlm", {}, CTC, refused=("hidden", "head")),
    "wavlm-stable": Case(
        "wavlm", {**STABLE, "feat_extract_norm": "layer", "num_hidden_layers": 3}, ("Model",),
        refused=("hidden", "head")),
    "wav2vec2-conformer": Case("wav2vec2-conformer", {**TDNN, **LONG}, ("Model", "ForXVector")),
    "wav2vec2-conformer-adapter": Case(
        "wav2vec2-conformer", {"position_embeddings_type": None, "add_adapter": True, "num_adapter_layers": 1},
        ("Model",)),
    "wav2vec2-bert": Case("wav2vec2-bert", {**TDNN, **LONG}, ("Model", "ForCTC", "Classification")),
    "wav2vec2-bert-adapter": Case("wav2vec2-bert", {**LONG, **ADAPTER}, ("Model",)),
    "whisper": Case(
        "whisper", {"encoder_layers": 2, "encoder_attention_heads": 4, "classifier_proj_size": 10},
        ("Classification",), refused=("hidden",)),
}  # fmt: skip
FAMILIES = {**TEXT, **OTHERS}


OTHERWISE = (
    "siglip-vision",  # its pooling head is not described and counted once for each image
    "siglip2-vision",
    "siglip2-vision-plain",  # how it stretches its positions is not counted
    "sew",  # its layers have fewer rows than come out
    "wav2vec2-conformer-adapter",
    "wav2vec2-bert-adapter",
    "beit-backbone",  # tried with a head alone, as the next one
    "whisper",
)
"""What PyTorch counts otherwise, or not by itself."""


def config_of(family: str, **more: Any) -> PretrainedConfig:
    """The small configuration of a case."""
    return specimens.tiny_config(FAMILIES[family].model_type, **FAMILIES[family].settings, **more)


def classes_of(family: str) -> list[type[PreTrainedModel]]:
    """The encoder and head classes of a case."""
    heads = FAMILIES[family].heads
    if isinstance(heads, str):
        return [getattr(transformers, name) for name in expand(heads)]
    return [cls for cls in specimens.head_classes(config_of(family)) if heads is None or cls.__name__.endswith(heads)]


def models(families: Mapping[str, Case]) -> Iterator[Any]:
    """Every case with every of its classes."""
    for family, case in families.items():
        if case.model_type in CONFIG_MAPPING:  # an earlier transformers may not have it
            for cls in classes_of(family):
                yield pytest.param(family, cls, id=f"{family}-{cls.__name__}")


def specimen(family: str, cls: type[PreTrainedModel]) -> PreTrainedModel:
    return specimens.specimen(cls(config_of(family)), rng())


@pytest.mark.parametrize(("family", "cls"), [*models(TEXT), *models(OTHERS)])
def test_every_law_holds(family: str, cls: type[PreTrainedModel]) -> None:
    """All choices of units for the encoders of text and the plain ones of the others; else all kinds at once.

    A head only reads the hidden dimensions.
    """
    refused = FAMILIES[family].refused
    units = tuple(unit for unit in UNIT_KINDS if unit not in refused)
    whole = cls.__name__.endswith(("Model", "Encoder")) and (family in TEXT or not FAMILIES[family].settings)
    report = cofiprune.check_adapter(cls(config_of(family)), units=None if whole else units)
    assert report.heads == (cls.__name__,)
    assert len(report.choices) == (2 ** len(units) - 1 if whole else 1)
    assert report.cases > 2 * len(report.choices)
    assert set(report.refused) == {f"{cls.__name__}: {unit}" for unit in refused}
    assert not report.skipped
    # The norms of DeBERTa (v1) compute in float32 in a float64 model too: where two numbers lie on either side of a
    # rounding boundary the difference is 1e-7.
    assert report.largest_difference <= (1e-5 if report.families == ("deberta",) else 1e-10)


@pytest.mark.parametrize(("family", "cls"), [each for each in models(FAMILIES) if FAMILIES[each.values[0]].refused])
def test_refused_units_say_why(family: str, cls: type[PreTrainedModel]) -> None:
    model = specimen(family, cls)
    assert set(cofiprune.structure(model).refused) == set(FAMILIES[family].refused)
    for unit in FAMILIES[family].refused:
        with pytest.raises(StructureError, match=f"cannot prune '{unit}' units: .{{20}}"):
            cofiprune.attach(model, (unit, "layer"))


@pytest.mark.parametrize("family", [name for name, case in OTHERS.items() if name not in OTHERWISE])
def test_operations_are_those_that_pytorch_counts(family: str) -> None:
    encoder = next(cls for cls in classes_of(family) if cls.__name__.endswith("Model"))
    # One example: what a conformer makes of its distances is the same for all of a batch.
    model = encoder(config_of(family, attn_implementation="eager")).eval()
    batch = {key: row[:1] for key, row in specimens.inputs(model, rng()).items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        rows = model(**batch).last_hidden_state.shape[1]
    structure = cofiprune.structure(model)
    assert 2 * accounting.model_macs(structure, rows).exact(structure.sizes) == counter.get_total_flops()


def test_rounding_of_deberta_is_rare() -> None:
    """The allowance for DeBERTa is for rounding only: a fault would show in every case."""
    model = specimen("deberta", transformers.DebertaForTokenClassification)
    batch = specimens.inputs(model, rng())
    exact = 0
    for seed in range(8):
        generator = rng(seed)
        with cofiprune.attach(model) as masks:
            for name in masks:
                masks[name] = specimens.random_values(len(masks[name]), generator, fractional=True)
            masked, plan = specimens.outputs(model, batch), masks.plan()
            small = cofiprune.compact(model)
        exact += compared(masked, specimens.outputs(small, batch), plan) <= 1e-10
    assert exact >= 7


def test_refused_units_are_left_out() -> None:
    talking = cofiprune.structure(specimen("deberta-talking", transformers.DebertaForTokenClassification))
    expected = ["layers.0.attention", "layers.0.ffn", "layers.0.intermediate"]
    assert [name for name in talking if "0" in name] == expected
    with pytest.raises(StructureError, match="talking_head mixes"):
        talking["layers.0.heads"]


def test_a_head_that_no_row_describes_refuses_the_hidden_size() -> None:
    structure = cofiprune.structure(transformers.BertLMHeadModel(specimens.tiny_config("bert")))
    assert "hidden" not in structure
    assert "BertLMHeadModel" in structure.refused["hidden"]


def test_a_unit_of_heads_is_a_group_of_queries_with_its_keys_and_values() -> None:
    model = transformers.EuroBertModel(config_of("eurobert"))
    structure = cofiprune.structure(model)
    assert structure["layers.0.heads"].size == 2
    query, key = (
        next(spec for spec in structure.parameters if spec.name == f"layers.0.self_attn.{name}_proj.weight")
        for name in "qk"
    )
    assert query.sides[0] is not None
    assert key.sides[0] is not None
    assert (query.sides[0].block, key.sides[0].block) == (12, 6)


def test_parts_of_a_pair_are_pruned_one_by_one() -> None:
    text, vision = (config_of(family).to_dict() for family in ("clip-text", "clip-vision"))
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)
    model = specimens.specimen(transformers.CLIPModel(config), rng())
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

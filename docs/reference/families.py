"""Write the table of families: every encoder of the installed transformers, tried under the laws of the masks.

    python docs/reference/families.py [MODEL_TYPE ...]

Each model type is built small, with random weights, bare and with one head; `check_adapter` runs all laws on it with
every choice of units, and sends compacted models through a file. Results are kept in `families.json` beside the table,
so that naming model types renews their rows only.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto import modeling_auto as auto

import cofiprune
from cofiprune.adapter import ENTRY_POINT_GROUP, known_families
from cofiprune.conformance.specimens import head_classes, inputs, outputs, tiny_sizes
from cofiprune.parts import encoder_within
from cofiprune.refusals import has_decoder, refuse, refuse_undeclared

HERE = Path(__file__).parent
TASKS = (
    "MASKED_LM",
    "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION",
    "QUESTION_ANSWERING",
    "IMAGE_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
)
HEADS = (
    "ForSequenceClassification",
    "ForImageClassification",
    "ForVideoClassification",
    "ForAudioClassification",
    "ForMaskedLM",
    "Projection",
)
FURTHER = (
    "aimv2_text_model",
    "aimv2_vision_model",
    "align_text_model",
    "altclip_text_model",
    "altclip_vision_model",
    "bert-generation",
    "blenderbot",
    "blenderbot-small",
    "blip_2_vision_model",
    "blip_text_model",
    "blip_vision_model",
    "bridgetower_text_model",
    "chinese_clip_text_model",
    "chinese_clip_vision_model",
    "clap_audio_model",
    "clap_text_model",
    "clipseg_text_model",
    "clipseg_vision_model",
    "dinov3_vit",
    "dpr",
    "flava_image_model",
    "flava_text_model",
    "git_vision_model",
    "groupvit_text_model",
    "groupvit_vision_model",
    "idefics2_vision",
    "idefics3_vision",
    "instructblip_vision_model",
    "instructblipvideo_vision_model",
    "internvl_vision",
    "janus_vision_model",
    "kosmos_2_5_vision_model",
    "kosmos_2_vision_model",
    "lasr_encoder",
    "llama4_vision_model",
    "m2m_100",
    "marian",
    "maskformer-swin",
    "mlcd_vision_model",
    "mllama_vision_model",
    "ovis2_vision",
    "owlv2_text_model",
    "owlv2_vision_model",
    "owlvit_text_model",
    "owlvit_vision_model",
    "parakeet_encoder",
    "pegasus",
    "pixio",
    "qwen2_audio_encoder",
    "radio",
    "sam_vision_model",
    "sapiens2",
    "smolvlm_vision",
    "speech_to_text",
    "tipsv2_text_model",
    "tipsv2_vision_model",
    "vilt",
    "visual_bert",
    "vit_mae",
    "vitdet",
    "voxtral_encoder",
    "xclip_text_model",
    "xclip_vision_model",
    "yolos",
)
"""Encoders that are parts of larger models, have heads of their own, or come with a decoder."""
LARGEST = 40_000_000
"""Parameters of a small model up to which it is tried; some families have tables that no setting makes small."""
SETTINGS: dict[str, dict[str, Any]] = {
    # Its block-sparse attention puts other modules into the model when a text is short.
    "big_bird": {"attention_type": "original_full"},
    # Its predictor.
    "vjepa2": {"pred_hidden_size": 24, "pred_num_attention_heads": 4, "pred_num_hidden_layers": 1},
    "vivit": {"tubelet_size": [2, 4, 4]},
}


def model_types() -> list[str]:
    """Every model type with an adapter or in one of the task mappings, less those that can only generate."""
    found = {*known_families(), *(name for name in FURTHER if name in CONFIG_MAPPING)}
    for task in TASKS:
        found |= set(getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES"))
    return sorted(found)


def models(model_type: str) -> list[transformers.PreTrainedModel]:
    """The bare encoder and one head, small; settings that only a wider model can have make it wider."""
    points = entry_points(group=ENTRY_POINT_GROUP, name=model_type)
    given = {**(next(iter(points)).load().test_settings if points else {}), **SETTINGS.get(model_type, {})}
    stock = AutoConfig.for_model(model_type)
    problem: Exception | None = None
    for wide in (False, True):
        try:
            return _built(AutoConfig.for_model(model_type, **{**tiny_sizes(stock, wide=wide), **given}))
        except Exception as error:
            problem = problem or error
    _refuse_by_kind(stock)
    assert problem is not None
    raise problem


def _built(config: transformers.PretrainedConfig) -> list[transformers.PreTrainedModel]:
    """Models of a configuration that run; a head that cannot be pruned is left out."""
    found = []
    for cls in _classes(config):
        with torch.device("meta"):
            skeleton = cls(copy.deepcopy(config))
        encoder = skeleton.get_encoder() if has_decoder(skeleton) else None
        if isinstance(encoder, transformers.PreTrainedModel):
            if found:
                continue
            cls, skeleton = type(encoder), encoder
        try:
            _check_kind(skeleton)
        except cofiprune.CofipruneError:
            if cls is _classes(config)[-1] and not found:
                raise
            continue
        size = sum(value.numel() for value in skeleton.parameters())
        if size > LARGEST:
            raise ValueError(f"the smallest model that its settings allow has {size:,} parameters")
        model = cls(copy.deepcopy(config))
        model.train(False)
        outputs(model, inputs(model, torch.Generator().manual_seed(0)))
        found.append(model)
    return found


def _refuse_by_kind(config: transformers.PretrainedConfig) -> None:
    """Say what a model is that has no small form, where that alone is a reason."""
    try:
        with torch.device("meta"):
            skeleton = _classes(config)[0](config)
    except Exception:
        return
    _check_kind(skeleton)


def _check_kind(model: transformers.PreTrainedModel) -> None:
    refuse(model)
    if model.config.model_type not in known_families() and not encoder_within(model):
        refuse_undeclared(model)


def _classes(config: transformers.PretrainedConfig) -> list[type[transformers.PreTrainedModel]]:
    classes = head_classes(config)
    bare = [cls for cls in classes if cls.__name__.endswith(("EncoderModel", "Model"))]
    bare.sort(key=lambda cls: not cls.__name__.endswith("EncoderModel"))
    heads = [cls for ending in HEADS for cls in classes if cls.__name__.endswith(ending)]
    return [*bare[:1], *heads[:1]] or classes[:1]


def tried(model_type: str) -> dict[str, Any]:
    """What becomes of one model type."""
    row: dict[str, Any] = {"how": "declared" if model_type in known_families() else "derived"}
    try:
        built = models(model_type)
    except Exception as error:
        how = "refused" if isinstance(error, cofiprune.CofipruneError) else "untried"
        return {"how": how, "why": _line(error)}
    row["classes"], row["difference"], row["refused"] = [], 0.0, {}
    kinds: set[str] | None = None
    for model in built:
        try:
            report = cofiprune.check_adapter(model)
        except Exception as error:
            if not row["classes"]:
                how = "refused" if isinstance(error, cofiprune.CofipruneError) else "untried"
                return {"how": how, "why": _line(error)}
            row.setdefault("without", {})[type(model).__name__] = _line(error)
            continue
        row["classes"].append(type(model).__name__)
        row["difference"] = max(row["difference"], report.largest_difference)
        if report.skipped:
            row.setdefault("skipped", {}).update({name: _line(why) for name, why in report.skipped.items()})
        structure = cofiprune.structure(model)
        row["refused"].update({unit: _line(why) for unit, why in structure.refused.items()})
        present = {group.kind for group in structure.groups}
        kinds = present if kinds is None else kinds & present
    row["groups"] = sorted(kinds or ())
    return row


def _line(error: object) -> str:
    return " ".join(str(error).split())[:600]


def main() -> None:
    """Try what was named, or everything, and write both files."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    store = HERE / "families.json"
    rows = json.loads(store.read_text()) if store.exists() else {}
    for model_type in sys.argv[1:] or model_types():
        rows[model_type] = tried(model_type)
        print(model_type, json.dumps(rows[model_type])[:300], flush=True)
        store.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n")
    (HERE / "families.md").write_text(page(rows))


def page(rows: dict[str, dict[str, Any]]) -> str:
    """The page of the documentation."""
    causal = [name for name, row in rows.items() if row["how"] == "refused" and "decoder-only" in row["why"]]
    kept = {name: row for name, row in rows.items() if row["how"] in ("declared", "derived")}
    refused = {name: row for name, row in rows.items() if row["how"] == "refused" and name not in causal}
    untried = {name: row for name, row in rows.items() if row["how"] == "untried"}
    full = [name for name, row in kept.items() if {"attention", "heads", "ffn", "intermediate"} <= set(row["groups"])]
    wide = [name for name in full if "hidden" in kept[name]["groups"]]
    lines = [
        "# Families",
        "",
        f"Every encoder of transformers {version('transformers')} that fills masks, classifies sequences, tokens, "
        "images, sound or videos, or answers questions, every model type that has an adapter, encoders that are parts "
        "of larger models, and those of models with a decoder (`model.get_encoder()`). Written by",
        "",
        "```",
        "python docs/reference/families.py",
        "```",
        "",
        f"**{len(full)}** model types keep the law with heads, feed-forward dimensions and both kinds of blocks, "
        f"**{len(wide)}** of them with hidden dimensions too.",
        "",
        "- **declared**: an adapter describes the family. **derived**: nobody has described it; its structure is found "
        "by watching a small model of it run, and the laws are checked before it is used.",
        "- **groups**: what can be pruned. A: attention blocks, H: heads, F: feed-forward blocks, I: feed-forward "
        "dimensions, D: hidden dimensions.",
        "- **difference**: the largest between masked and compacted outputs in float64, over random hard and "
        "fractional masks and every choice of units, with padding; compacted models went through a file. Families that "
        "compute in float32 inside show about 1e-7.",
        "",
        "| model type | | groups | difference | what cannot be pruned |",
        "|---|---|---|---|---|",
    ]
    letters = {"attention": "A", "heads": "H", "ffn": "F", "intermediate": "I", "hidden": "D"}
    for name, row in kept.items():
        groups = " ".join(letter for kind, letter in letters.items() if kind in row["groups"])
        reasons = [f"{unit}: {_short(why)}" for unit, why in row["refused"].items()]
        reasons += [f"{cls}: {_short(why)}" for cls, why in row.get("without", {}).items()]
        lines.append(f"| `{name}` | {row['how']} | {groups} | {row['difference']:.1e} | {'; '.join(reasons)} |")
    lines += _portable(kept)
    published = json.loads((HERE / "published.json").read_text())
    lines += [
        "",
        "## Published configurations",
        "",
        "Small models with the settings of these checkpoints are pruned on data by each method, compacted, saved, and "
        "loaded again in another process (`tests/contract/test_published_configurations.py`; the other families above "
        "too, with the defaults of their configurations):",
        "",
        ", ".join(f"{name} (`{entry['model_type']}`)" for name, entry in published.items()) + ".",
        "",
    ]
    lines += ["## Refused", "", "| model type | why |", "|---|---|"]
    lines += [f"| `{name}` | {_short(row['why'])} |" for name, row in refused.items()]
    lines += [
        "",
        "## Not tried",
        "",
        "No small model of these could be built and run; a model itself may well be derived.",
        "",
    ]
    lines += ["| model type | what stood in the way |", "|---|---|"]
    lines += [f"| `{name}` | {_short(row['why'])} |" for name, row in untried.items()]
    lines += ["", "## Decoder-only", "", ", ".join(f"`{name}`" for name in causal) + ".", ""]
    return "\n".join(lines)


def _portable(kept: dict[str, dict[str, Any]]) -> list[str]:
    """What `portable.py` found out about folders where cofiprune is not imported."""
    lines = [
        "",
        "## Without cofiprune",
        "",
        "Pruned folders of these model types, written with transformers 5.24, loaded by the file in them where "
        "cofiprune cannot be imported ([how](../how-to/load-without-cofiprune.md)). An attention block was gone, a "
        "whole layer, or neither; heads were uneven, hidden dimensions fewer where they can go. The difference is the "
        "largest to the compacted model in float64, with padding. What is not counted ended in an error, "
        "but for `chinese_clip_text_model`, whose dense model transformers itself loads otherwise than it was saved. "
        "Written by",
        "",
        "```",
        "python docs/reference/portable.py PYTHON ...",
        "```",
        "",
        "| transformers | model types | largest difference | which |",
        "|---|---|---|---|",
    ]
    store = json.loads((HERE / "portable.json").read_text())
    for release, rows in sorted(store.items(), reverse=True):
        numbers = {name: value for name, value in rows.items() if name in kept and isinstance(value, float)}
        found = {name: value for name, value in numbers.items() if value < 1e-5}
        exact = {name: value for name, value in found.items() if value <= 1e-10}
        names = ", ".join(f"`{name}`" for name in kept if name not in found)
        shown = f"all but {names}" if 2 * len(found) > len(kept) else ", ".join(f"`{name}`" for name in found)
        rounded = "".join(f"; `{name}` {value:.1e}" for name, value in found.items() if name not in exact)
        largest = f"{max(exact.values()):.1e}{rounded}"
        lines.append(f"| {release} | {len(found)} of {len(kept)} | {largest} | {shown} |")
    return lines


def _short(why: str) -> str:
    """The reason without what stands around it."""
    for before in ("none could be derived: ", "masked and compacted model differ by "):
        _, found, after = why.partition(before)
        why = (f"differs by {after}" if "differ" in before else after) if found else why
    why = why.partition(". docs/reference/families.md lists ")[0]
    return (why if len(why) <= 200 else why[:197] + "...").replace("|", "\\|")


if __name__ == "__main__":
    main()

"""Write the files that `tests/unit/test_old_files.py` reads, with the version of today. They are written once and kept.

    PYTHONPATH=tests/helpers:tests/integration:tests/unit python tests/data/record.py tests/data/VERSION

A later format is added as one more folder, beside those that are there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

import cofiprune
from small import build

SIZES = {"hidden_size": 16, "intermediate_size": 20, "vocab_size": 30, "max_position_embeddings": 16}


def compacted(name: str, **settings: object) -> transformers.PreTrainedModel:
    model = build(name, dtype=torch.float32, **{**SIZES, **settings})
    with cofiprune.attach(model) as masks:
        masks["hidden"] = [1.0] * 12 + [0.0] * 4
        masks["layers.0.heads"] = [1, 0, 0.5, 1]
        masks["layers.0.ffn"] = [0]
        masks["layers.1.intermediate"] = [0.0] * 8 + [1.0] * 12
        return cofiprune.compact(model)


def whole() -> transformers.PreTrainedModel:
    image = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 20}
    text = {**image, "vocab_size": 30, "max_position_embeddings": 16}
    parts = (transformers.ViTConfig(**image, image_size=8, patch_size=4), transformers.BertConfig(**text))
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(*parts, projection_dim=6)
    torch.manual_seed(0)
    model = transformers.VisionTextDualEncoderModel(config).eval()
    with cofiprune.attach(model.text_model, "head") as masks:
        masks["layers.0.heads"] = [1, 0, 1, 1]
        model.text_model = cofiprune.compact(model.text_model)
    cofiprune.record_parts(model)
    return model


def record(folder: Path) -> None:
    import test_cofi_checkpoint as cofi  # late: pytest looks for examples in this file too
    from test_old_files import answers, inputs_of, loaded

    cofi.H, cofi.WIDTH = 16, 12
    compacted("BertForSequenceClassification").save_pretrained(folder / "compacted")
    compacted("SplinterModel", question_token_id=29).save_pretrained(folder / "compacted-derived")
    whole().save_pretrained(folder / "parts")
    cofi.full(folder / "cofi-masks")
    cofi.released(folder / "cofi-cut")
    model = build("BertForSequenceClassification", dtype=torch.float32, **SIZES)
    values = {"hidden": torch.arange(16) % 4 > 0, "layers.1.heads": torch.tensor([1, 0.5, 0, 1])}
    cofiprune.Plan.from_values(cofiprune.structure(model), values).save(folder / "plan.json")
    for each in sorted(path for path in folder.iterdir() if path.is_dir()):
        inputs = inputs_of(each.name)
        save_file({**inputs, "answers": answers(loaded(each), inputs)}, each / "recorded.safetensors")
    print(json.dumps({"cofiprune": cofiprune.__version__, "transformers": transformers.__version__}))


if __name__ == "__main__":
    record(Path(sys.argv[1]))

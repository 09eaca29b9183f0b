"""Every family, with the settings of its published checkpoints: pruned on data, saved, loaded by another process.

The laws look at one forward pass of a random model. A run does more: it refits layers, differentiates, trains, cuts and
loads again. Sizes are small; every other setting is that of the checkpoint that a case is named after.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

import cofiprune
from cofiprune.conformance import specimens
from cofiprune.data import batches

METHODS = ("one-shot", "cofi", "gates")

# By name: model type, and what the checkpoint of that name sets beside the sizes.
PUBLISHED = json.loads((Path(__file__).parents[2] / "docs" / "reference" / "published.json").read_text())


def unpublished() -> Iterator[tuple[str, tuple[str, Mapping[str, Any]]]]:
    """The other families that keep the law, with the defaults of their configuration."""
    path = Path(__file__).parents[2] / "docs" / "reference" / "families.json"
    done = {entry["model_type"] for entry in PUBLISHED.values()}
    for model_type, entry in json.loads(path.read_text()).items():
        loads = all(hasattr(transformers, name) for name in entry.get("classes", ()))  # not the encoder of a pair
        if model_type not in done and "difference" in entry and entry.get("groups") and loads:
            yield model_type, (model_type, {})


CASES = {
    **{name: (entry["model_type"], entry.get("settings", {})) for name, entry in PUBLISHED.items()},
    **dict(unpublished()),
}


# Families with defaults for which no model is small, or none that runs.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "bros": {"hidden_size": 192, "intermediate_size": 136},
    "dinov3_vit": {"hidden_size": 32},
    "mlcd_vision_model": {"hidden_size": 32},
    "vivit": {"tubelet_size": [2, 4, 4]},
}


def model_of(name: str) -> PreTrainedModel:
    """A random model of a case: a classifier where the family has one, else the encoder."""
    model_type, settings = CASES[name]
    settings = {**SETTINGS.get(model_type, {}), **settings}
    config = specimens.tiny_config(model_type, **settings)
    classes = specimens.head_classes(config)
    endings = ("ForSequenceClassification", "ForImageClassification", "ForAudioClassification", "Model", "")
    if "t5" in model_type:  # its classifiers have a decoder
        endings = ("EncoderModel",)
    cls = next(cls for ending in endings for cls in classes if cls.__name__.endswith(ending))
    model = specimens.specimen(cls(config), torch.Generator().manual_seed(0)).float()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            torch.nn.init.zeros_(module.weight[module.padding_idx].detach())  # as transformers loads it
    return model


def rows_of(model: PreTrainedModel, count: int = 36) -> list[dict[str, Any]]:
    """Rows without padding for a model's inputs; with labels of two classes where it has a head for them."""
    generator = torch.Generator().manual_seed(1)
    labelled = "labels" in batches.label_names(model)
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        batch = specimens.inputs(model, generator)
        for index in range(3):
            row: dict[str, Any] = {key: value[index] for key, value in batch.items()}
            if "attention_mask" in row and row["attention_mask"].shape == row[model.main_input_name].shape[:1]:
                length = int(row["attention_mask"].sum())
                row = {
                    key: value[:length] if value.shape[:1] == row["attention_mask"].shape else value
                    for key, value in row.items()
                    if key != "attention_mask"
                }
            rows.append({**row, **({"labels": len(rows) % 2} if labelled else {})})
    return rows


READER = """
import sys, warnings
warnings.filterwarnings("ignore")
import torch, transformers, cofiprune
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
for line in sys.stdin:
    folder, name = line.split()
    try:
        model = getattr(transformers, name).from_pretrained(folder).eval()
        batch, outputs = torch.load(folder + "/expected.pt")
        with torch.no_grad():
            found = model(**batch)
        off = max(float((found[key] - value).abs().max()) for key, value in outputs.items())
        print("off", off, flush=True)
    except Exception as error:
        print("failed", type(error).__name__, str(error).replace("\\n", " "), flush=True)
"""


@pytest.fixture(scope="module")
def off_in_another_process() -> Iterator[Callable[[Path, str], str]]:
    """Load a folder in a process that has seen nothing but files: by how much its outputs differ, or what failed."""
    command = [sys.executable, "-c", READER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(folder: Path, name: str) -> str:
            print(folder, name, file=process.stdin, flush=True)
            return process.stdout.readline().strip()

        yield ask
        process.stdin.close()


def cases() -> Iterator[Any]:
    """Every case with every method; by default published ones, one method each, in turns."""
    for number, (name, method) in enumerate(itertools.product(CASES, METHODS)):
        index, turn = divmod(number, len(METHODS))
        often = name in PUBLISHED and index % len(METHODS) == turn
        yield pytest.param(name, method, id=f"{name}-{method}", marks=() if often else pytest.mark.slow)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "method"), list(cases()))
def test_family_is_pruned_on_data_and_loads_again(name, method, tmp_path, off_in_another_process):
    if CASES[name][0] not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} does not have it")
    model = model_of(name)
    rows = rows_of(model)
    result = cofiprune.prune(
        model,
        rows,
        target_sparsity=0.4,
        method=method,
        teacher="self",
        **({} if method == "one-shot" else {"epochs": 1}),
        finetune_epochs=1,
        batch_size=8,
        progress=False,
    )
    small = result.compact().eval()
    assert result.sparsity == pytest.approx(0.4, abs=0.06)
    batch = specimens.inputs(small, torch.Generator().manual_seed(2))
    with torch.no_grad():
        outputs = {key: value for key, value in small(**batch).items() if isinstance(value, Tensor)}
    assert all(torch.isfinite(value).all() for value in outputs.values())
    small.save_pretrained(tmp_path)
    torch.save((batch, outputs), tmp_path / "expected.pt")
    kind, off, *_ = (answer := off_in_another_process(tmp_path, type(small).__name__)).split()
    assert kind == "off", answer
    assert float(off) <= 1e-5

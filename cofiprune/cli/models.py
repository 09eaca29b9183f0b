"""Models and tokenizers by name: a local directory or a name on the hub, and the task that says which class."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cofiprune.cli.options import UsageError, one_of
from cofiprune.errors import CheckpointError, CofipruneError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TASKS: Mapping[str, str] = {
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
    "masked-lm": "ForMaskedLM",
    "multiple-choice": "ForMultipleChoice",
    "image-classification": "ForImageClassification",
    "audio-classification": "ForAudioClassification",
    "feature-extraction": "",
}
"""Task: the ending of the AutoModel class that loads a model for it."""
_TOKENIZER_FILES = ("tokenizer*.json", "vocab.*", "merges.txt", "*.model")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the model, as a position or as `--model`, and its task."""
    # Without SUPPRESS an empty position would overwrite what --model gave.
    parser.add_argument("model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help="directory or hub name")
    parser.add_argument("--model", dest="model", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    add_task_option(parser)


def add_task_option(parser: argparse.ArgumentParser) -> None:
    """Add the choice of a task."""
    text = f"{', '.join(TASKS)} (default: what the model's configuration says, else {next(iter(TASKS))})"
    parser.add_argument("--task", type=one_of(TASKS, "task"), metavar="TASK", help=text)


def model_name(options: argparse.Namespace) -> str:
    """Return the model that the command line names.

    :raises UsageError: when it names none.
    """
    if not hasattr(options, "model"):
        raise UsageError("MODEL is missing: a directory with config.json, or a name on the hub")
    return str(options.model)


def load_config(name: str) -> PretrainedConfig:
    """Load a model's configuration.

    :raises CheckpointError: when there is no such model.
    """
    from transformers import AutoConfig

    _check_directory(name)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)  # type: ignore[no-any-return]
    except Exception as error:  # of the hub, the file or the validators: each library has classes of its own
        nowhere = "" if Path(name).is_dir() else "there is no such directory, and from the hub: "
        raise CheckpointError(f"cannot load {name}: {nowhere}{first_line(error)}") from error


def task_by_architecture(config: PretrainedConfig) -> str | None:
    """Return the task of the class that a model was saved from; None when the configuration does not tell."""
    architecture = next(iter(config.architectures or ()), "")
    endings = {**TASKS, "feature-extraction": "Model"}
    return next((task for task, ending in endings.items() if architecture.endswith(ending)), None)


def load_model(
    name: str,
    task: str | None = None,
    *,
    config: PretrainedConfig | None = None,
    dtype: Any = None,
    new_head: bool = False,
) -> PreTrainedModel:
    """Load a model by the AutoModel class of a task, in evaluation mode.

    :param task: by default the one of the architecture in the configuration, else sequence classification.
    :param dtype: of the weights; float32 by default, whatever they are stored in.
    :param new_head: weights that the checkpoint lacks are to be trained, and need no warning.
    :raises CheckpointError: when it cannot be loaded, saying why.
    """
    import torch
    import transformers

    config = config or load_config(name)
    task = task or task_by_architecture(config) or next(iter(TASKS))
    auto = getattr(transformers, f"AutoModel{TASKS[task]}")
    try:
        model, found = auto.from_pretrained(
            name, config=config, dtype=dtype or torch.float32, trust_remote_code=False, output_loading_info=True
        )
    except CofipruneError:
        raise
    except Exception as error:  # missing files, shapes that differ, a task that the family does not have
        raise CheckpointError(f"cannot load {name} for {task}: {first_line(error)}{_hint(name)}") from error
    new = sorted(found["missing_keys"])
    if new and not new_head:
        named = f"{', '.join(new[:2])}{' and others' if new[2:] else ''}"
        warnings.warn(f"{name} has no weights for {named}: they are random until trained", UserWarning, stacklevel=2)
    model.train(False)
    return model  # type: ignore[no-any-return]


def to_device(model: PreTrainedModel, device: str | None) -> PreTrainedModel:
    """Move a model to a device, by default to a GPU where there is one.

    :raises UsageError: when there is no such device.
    """
    import torch

    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(wanted)  # type: ignore[no-any-return, arg-type]
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled for the device
        raise UsageError(f"cannot use the device {wanted!r}: {first_line(error)}") from error


def load_tokenizer(name: str) -> Any:
    """Load a tokenizer, or return None for a model without one.

    :raises CheckpointError: when it is there and cannot be loaded.
    """
    from transformers import AutoTokenizer

    folder = Path(name)
    # For a directory without its files transformers makes up an empty tokenizer.
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(f"cannot load the tokenizer of {name}: {first_line(error)}") from error


def _check_directory(name: str) -> None:
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            found = ", ".join(sorted(file.name for file in path.iterdir())[:6]) or "nothing"
            raise CheckpointError(f"{name} holds no model: it has no config.json; in it: {found}")
        if (path / "zs.pt").is_file() and not (path / "model.safetensors").is_file():  # it would load without its masks
            raise CheckpointError(f"{name} has masks of the original CoFi; read it by: cofiprune convert {name} OUT")
    elif path.exists():
        raise CheckpointError(f"{name} is a file; name the directory that holds config.json and the weights")
    elif name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
        raise CheckpointError(f"there is no directory {name}")


def _hint(name: str) -> str:
    original = (Path(name) / "pytorch_model.bin").is_file()
    return f"; if the original CoFi wrote it, read it by: cofiprune convert {name} OUT" if original else ""


def first_line(error: BaseException) -> str:
    """Return the beginning of a message; transformers explains at length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 240 else f"{text[:240]}..."

"""Telling folders of the original CoFi from other folders whose weights are in `pytorch_model.bin`."""

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

import cofiprune

WEIGHTS, MASKS = "pytorch_model.bin", "zs.pt"


def is_original(source: str) -> bool:
    """Whether a source is a folder of the original CoFi: it has masks, or weights that are cut.

    Many models that nobody pruned have their weights in `pytorch_model.bin` too. A file that cannot be read is taken
    for one of the original's: `cofiprune.load_cofi_checkpoint` says what is wrong with it, and executes nothing in it.
    """
    folder = Path(source).expanduser()
    if not (folder / WEIGHTS).is_file() or (folder / "model.safetensors").is_file():
        return False
    if (folder / MASKS).is_file():
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return "quantization_config" not in config and is_cut(config, shapes(folder / WEIGHTS))
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError, cofiprune.CofipruneError):
        return True


def shapes(file: Path) -> dict[str, torch.Size]:
    """The shapes of a file's tensors; nothing in it is executed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickle protocols that torch may not read whole; then it fails as well
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    return {name: value.shape for name, value in tensors.items() if isinstance(value, torch.Tensor)}


def is_cut(config: dict[str, Any], found: dict[str, torch.Size]) -> bool:
    """Whether matrices of the layers are missing, or smaller than a configuration says."""
    settings = {name: value for name, value in config.items() if name not in ("model_type", "pruned_heads")}
    with torch.device("meta"):
        made = transformers.AutoConfig.for_model(config["model_type"], **settings)
        whole = transformers.AutoModel.from_config(made)
    inside = tuple(f"{path}." for path in cofiprune.structure(whole).layers)
    prefix = f"{whole.base_model_prefix}."
    here = {name.removeprefix(prefix): shape for name, shape in found.items()}
    return any(
        here.get(name) != value.shape
        for name, value in whole.state_dict().items()
        if name.startswith(inside) and value.dim() > 1
    )

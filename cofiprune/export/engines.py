"""Models as passes of an engine: what a forward pass takes where a model is going to be served."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cofiprune.export.comparison import EXAMPLE, example
from cofiprune.export.graph import float_copy, write_onnx
from cofiprune.export.openvino import openvino_answers
from cofiprune.export.quantisation import quantise_onnx
from cofiprune.export.sessions import onnx_answers
from cofiprune.export.write import check_packages

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def version_of(engine: str) -> str:
    """Return the version of an engine's package.

    :raises SettingsError: when it is not installed, saying what to install.
    """
    name, package = ("openvino", "openvino") if engine == "openvino" else ("onnx", "onnxruntime")
    check_packages([name])
    return version(package)


def pass_of(
    model: PreTrainedModel, engine: str, inputs: dict[str, Tensor], folder: Path, *, threads: int
) -> Callable[[], Any]:
    """Export a model and return its forward pass over some inputs, on the CPU.

    :param engine: "onnx", "onnx-int8", which is dynamic, or "openvino".
    :param folder: for its files, an empty one that stays until the passes are done.
    :raises ExportError: when the engine cannot take it.
    """
    own, whole = float_copy(model)
    graph, small = folder / "model.onnx", folder / "small.onnx"
    write_onnx(whole, own, graph, example(own, *EXAMPLE))
    if engine == "onnx-int8":
        quantise_onnx(graph, small, own, int8="dynamic")
    load = openvino_answers if engine == "openvino" else onnx_answers
    return partial(load(small if small.exists() else graph, threads=threads), inputs)

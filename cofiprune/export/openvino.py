"""OpenVINO models, made from an ONNX graph of standard operators."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from cofiprune.data.batches import Batch
from cofiprune.errors import ExportError, explained
from cofiprune.export.sessions import feed_of
from cofiprune.measure.answers import Answer


def write_openvino(source: Path, target: Path) -> None:
    """Convert an ONNX file; weights stay float32.

    :param target: the file that ends in .xml; weights go beside it, into one that ends in .bin.
    :raises ExportError: when OpenVINO cannot read the graph.
    """
    openvino = import_module("openvino")
    with explained(ExportError, f"OpenVINO cannot convert {source.name}", Exception):
        openvino.save_model(openvino.convert_model(str(source)), str(target), compress_to_fp16=False)


def openvino_answers(file: Path, *, threads: int = 0, precision: str = "f32") -> Answer:
    """Load an OpenVINO model, or an ONNX file, on the CPU.

    :param threads: of the CPU; 0 leaves it to OpenVINO.
    :param precision: in which products are computed: "f32", or "bf16" where the processor has it.
    :raises ExportError: when OpenVINO cannot load it.
    """
    openvino = import_module("openvino")
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    with explained(ExportError, f"OpenVINO cannot load {file}", Exception):
        compiled = openvino.Core().compile_model(str(file), "CPU", settings)
    return compiled_answers(compiled)


def compiled_answers(compiled: Any) -> Answer:
    """Return a compiled model as what answers batches."""
    request = compiled.create_infer_request()
    given = {entry.any_name for entry in compiled.inputs}
    names = [entry.any_name for entry in compiled.outputs]

    def answer(batch: Batch) -> dict[str, torch.Tensor]:
        computed = request.infer(feed_of(batch, given))
        return {name: torch.from_numpy(computed[index].copy()) for index, name in enumerate(names)}

    return answer

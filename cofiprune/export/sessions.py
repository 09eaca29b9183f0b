"""Exported files that answer batches as a model does."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cofiprune.data.batches import Batch
from cofiprune.measure.answers import Answer


def feed_of(batch: Batch, names: set[str]) -> dict[str, Any]:
    """Return the inputs that a file reads; token types and boxes, which rows often lack, are 0 then."""
    feed = {name: value.numpy() for name, value in batch.items() if name in names}
    for name, width in (("token_type_ids", ()), ("bbox", (4,))):
        if name in names - set(feed):
            feed[name] = np.zeros((*feed["input_ids"].shape, *width), dtype=np.int64)
    return feed


def onnx_answers(file: Path, *, threads: int = 0) -> Answer:
    """Load an ONNX file.

    :param threads: of the CPU; 0 leaves it to onnxruntime.
    """
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    given = {entry.name for entry in session.get_inputs()}
    names = [entry.name for entry in session.get_outputs()]

    def answer(batch: Batch) -> dict[str, torch.Tensor]:
        computed = session.run(names, feed_of(batch, given))
        return {name: torch.from_numpy(values) for name, values in zip(names, computed, strict=True)}

    return answer

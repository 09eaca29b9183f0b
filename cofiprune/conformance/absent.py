"""Loading a compacted model as a process does that has no cofiprune, without the seconds that starting one takes."""

from __future__ import annotations

import importlib.util
import logging
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.logging import get_verbosity, set_verbosity

from cofiprune.compaction import hub
from cofiprune.compaction.modelling import modelling_file
from cofiprune.errors import CheckpointError
from cofiprune.record import METHOD


def loaded_without(model: PreTrainedModel) -> PreTrainedModel | None:
    """Save a compacted model, and load it by the modelling file of its folder, in float64.

    :return: None for a model of which there can be no such file.
    """
    try:
        file = modelling_file(model, alone=True)
    except CheckpointError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, portable=False)
        path = Path(folder) / file.name
        path.write_text(file.source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with absent():
            sys.modules[path.stem] = module  # transformers looks it up
            try:
                spec.loader.exec_module(module)
                cls: type[PreTrainedModel] = getattr(module, type(model).__name__)
                return cls.from_pretrained(folder, dtype=torch.float64)
            finally:
                del sys.modules[path.stem]


@contextmanager
def absent() -> Iterator[None]:
    """Take back what importing cofiprune changes, and make importing it an error."""
    hidden = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "cofiprune"}
    loader, config = AUTO_QUANTIZER_MAPPING.pop(METHOD), AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD)
    from_config, verbosity = PreTrainedModel.__dict__["_from_config"], get_verbosity()
    PreTrainedModel._from_config = classmethod(hub.stock_from_config)  # type: ignore[method-assign,assignment]
    set_verbosity(logging.ERROR)  # it warns of a method that it does not know
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: importing it is an error
    try:
        yield
    finally:
        sys.modules.update(hidden)
        set_verbosity(verbosity)
        PreTrainedModel._from_config = from_config  # type: ignore[method-assign]
        AUTO_QUANTIZER_MAPPING[METHOD], AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = loader, config

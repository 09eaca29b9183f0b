"""A model as an ONNX graph of standard operators, in a form that runtimes are fast on.

Attention is exported as the family's own formula, products and a softmax, because the exporter guards torch's fused
kernel against rows without any key, and no runtime knows attention again behind that. Padding becomes a mask of one row
for each example, [B, 1, 1, T], made once.

Residual sums are written as `Sum`. Of an `Add` in front of a norm ONNX Runtime makes one operator,
SkipLayerNormalization, whose loop over the hidden dimensions is not vectorised: of a BERT at a sparsity of 0.95 it took
40 % of the time.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cofiprune.data.tasks import main_input
from cofiprune.errors import ExportError, explained, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ONE_FILE = 1_500_000_000
"""Largest size of weights in bytes that goes into the file itself; ONNX files end at 2 GiB."""
_NORMS = ("LayerNormalization", "RMSNormalization")


class Embedder(nn.Module):
    """An encoder and the modules behind it, such as sentence-transformers has: states first, then the embedding."""

    def __init__(self, model: PreTrainedModel, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.model, self.behind = model, nn.ModuleList(modules)
        # The exporter asks for the names of arguments, which are the model's.
        self.forward = wraps(model.forward)(lambda **inputs: self._embedded(inputs))

    def _embedded(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the states of tokens [B, T, H], and the embedding of each row [B, E]."""
        states = self.model(**inputs)[0]
        features = {**inputs, "token_embeddings": states}
        for module in self.behind:
            features = module(features)
        return {"last_hidden_state": states, "sentence_embedding": features["sentence_embedding"]}


def float_copy(model: PreTrainedModel, modules: Sequence[nn.Module] = ()) -> tuple[PreTrainedModel, nn.Module]:
    """Copy a model to the CPU in float32, for inference.

    :param modules: that read its states.
    :return: the copy, and what is to be exported: the copy itself, or an `Embedder` around it.
    """
    own: Any = copy.deepcopy(model)
    own = own.float().cpu().eval().requires_grad_(False)
    if not modules:
        return own, own
    behind = [copy.deepcopy(module).float().cpu().eval().requires_grad_(False) for module in modules]
    return own, Embedder(own, behind)


def write_onnx(
    whole: nn.Module,
    model: PreTrainedModel,
    file: Path,
    inputs: Mapping[str, Tensor],
    *,
    opset: int | None = None,
    mark: str = "",
) -> None:
    """Export what `float_copy` made, with the number of rows and, for text, of tokens left open.

    :param inputs: an example.
    :param mark: a text that stands in the file, and in those that are made of it.
    :raises ExportError: when torch cannot export it.
    """
    with torch.no_grad():
        names = list(tensors(whole(**inputs)))
    size = sum(parameter.numel() * parameter.element_size() for parameter in whole.parameters())
    try:
        with _quiet(), _plain_attention(model), torch.no_grad():
            program: Any = torch.onnx.export(
                whole,
                (),
                kwargs=dict(inputs),
                output_names=names,
                dynamic_shapes=_open_dimensions(model, inputs),
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # the exporter wraps whatever the modelling code raises
        cause = one_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
        raise ExportError(f"torch cannot export this {type(model).__name__}: {cause}") from error
    _sum_residuals(program.model.graph)
    program.model.metadata_props["cofiprune"] = mark
    with explained(ExportError, f"{file.name} cannot be written", OSError):
        program.save(file, external_data=size > _ONE_FILE)


def tensors(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return those outputs of a model that a file can have."""
    return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


def _open_dimensions(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, dict[int, Any]]:
    """Name the dimensions of each input that the example does not fix."""
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    text = main_input(model) == "input_ids"
    open_ = {name: text or (name == "input_values" and value.dim() == 2) for name, value in inputs.items()}  # or sound
    axis = inputs[main_input(model)].dim() - 1
    return {name: {0: batch, **({axis: sequence} if open_[name] else {})} for name in inputs}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporter says of itself from the user."""
    loggers = {logger: logger.level for logger in map(logging.getLogger, ("torch.onnx", "onnxscript", "onnx_ir"))}
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)


@contextmanager
def _plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Have a model compute attention by its own formula, with small masks, while it is exported."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS

    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")
    before = MASKS["eager"]
    MASKS["eager"] = partial(_small_mask, before)
    try:
        yield
    finally:
        MASKS["eager"] = before


def _small_mask(large: Any, **given: Any) -> Tensor | None:
    """Return the additive mask of padding, [B, 1, 1, T]; masks that depend on the query are made as ever."""
    from transformers.masking_utils import bidirectional_mask_function

    mask = given.get("attention_mask")
    plain = given.get("mask_function") is bidirectional_mask_function and not given.get("use_vmap")
    if mask is None or mask.dim() != 2 or not plain:
        made: Tensor | None = large(**given)
        return made
    dtype = given.get("dtype", torch.float32)
    masked: Tensor = (1 - mask[:, None, None, :].to(dtype)) * torch.finfo(dtype).min
    return masked


def _sum_residuals(graph: Any) -> None:
    """Write the sums that norms read as `Sum`."""
    for node in graph:
        source = node.inputs[0].producer() if node.op_type in _NORMS else None
        if source is not None and source.op_type == "Add":
            source.op_type = "Sum"

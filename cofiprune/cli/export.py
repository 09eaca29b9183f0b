"""`cofiprune export` and `convert`: a model as ONNX, compared with the original; an original CoFi run as a model."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cofiprune.cli.beside import Beside
from cofiprune.cli.loading import TASKS, add_task_option, load_config, load_model, load_tokenizer, task_by_architecture
from cofiprune.cli.options import UsageError, at_least, one_of, writable_directory
from cofiprune.errors import CofipruneError, explained

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_FORMATS = ("onnx",)
_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")
_NEEDED = ("onnx", "onnxscript")
_EXAMPLE = (2, 8)
_COMPARED = ((1, 5), (3, 12))
"""Numbers of rows and tokens other than those of the example that is traced."""
_TOLERANCE = 1e-3
_ONE_FILE = 1_500_000_000
"""Largest size of weights in bytes that goes into the file itself; ONNX files end at 2 GiB."""


class ExportError(CofipruneError, RuntimeError):
    """A model that cannot be exported, or whose export computes something else."""


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """Add what `export` takes."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="directory or hub name")
    add("out", metavar="OUT", help="a file that ends in .onnx, or a directory for model.onnx")
    add("--format", type=one_of(_FORMATS, "format"), default="onnx", metavar="{onnx}", help="(default: onnx)")
    add("--opset", type=at_least(18), metavar="N", help="version of ONNX's operators (default: torch's own)")
    add_task_option(parser)


def add_convert_options(parser: argparse.ArgumentParser) -> None:
    """Add what `convert` takes."""
    add = parser.add_argument
    add("path", metavar="DIR", help="config.json, pytorch_model.bin and, of a run, zs.pt")
    add("out", metavar="OUT", help="directory to write to")
    text = f"{', '.join(_HEADS)} (default: what config.json says)"
    add("--task-head", type=one_of(_HEADS, "head"), metavar="HEAD", help=text)


def convert(options: argparse.Namespace) -> None:
    """Write an original CoFi run as an ordinary compacted model, and print its summary."""
    from cofiprune import cofi_checkpoint
    from cofiprune.measure.summary import summary

    model = cofi_checkpoint.convert(options.path, options.out, task_head=options.task_head)
    print(f"{summary(model)}\n\nsaved in {options.out}")


def export(options: argparse.Namespace) -> None:
    """Write the file, and print how far its outputs are from the model's."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UsageError(f"export needs {' and '.join(missing)}: pip install {' '.join((*_NEEDED, 'onnxruntime'))}")
    out = Path(options.out).expanduser()
    is_file = out.suffix == ".onnx"
    folder = writable_directory(str(out.parent if is_file else out))
    config, beside = load_config(options.model), Beside.of(options.model)
    if not is_file:
        beside.refuse_a_part()
    stated = task_by_architecture(config)
    task = options.task or ("feature-extraction" if beside.pools else stated) or next(iter(TASKS))
    model = load_model(options.model, task, config=config)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (out.name if is_file else "model.onnx")
    names = write_onnx(model, file, opset=options.opset)
    if not is_file and not (folder / "config.json").exists():
        model.config.save_pretrained(folder)
        tokenizer = load_tokenizer(options.model)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        beside.for_task(task, stated, tokenised=tokenizer is not None).copy_to(folder, model.config)
    print(f"saved {file} ({file.stat().st_size / 1e6:.1f} MB), outputs {', '.join(names)}")
    if find_spec("onnxruntime") is None:
        print("not compared with torch: onnxruntime is not installed")
        return
    found = largest_difference(model, file)
    print(f"largest difference from torch: {found:.2g}")
    if not found <= _TOLERANCE:
        raise ExportError(f"{file} computes something else than {options.model}: outputs differ by {found:.2g}")


def write_onnx(model: PreTrainedModel, file: Path, *, opset: int | None = None) -> list[str]:
    """Export a model, with the number of rows and, for text, of tokens left open.

    :return: the names of the outputs.
    :raises ExportError: when torch cannot export it.
    """
    import torch

    inputs = example(model, *_EXAMPLE)
    with torch.no_grad():
        names = list(_tensors(model(**inputs)))

    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    # The exporter wraps whatever the modelling code raises.
    with explained(ExportError, f"torch cannot export this {type(model).__name__}", Exception):
        torch.onnx.export(
            model,
            (),
            file,
            kwargs=inputs,
            output_names=names,
            dynamic_shapes=_open_dimensions(model, inputs),
            opset_version=opset,
            dynamo=True,
            verbose=False,
            external_data=size > _ONE_FILE,
        )
    return names


def example(model: PreTrainedModel, rows: int, tokens: int) -> dict[str, Tensor]:
    """Make synthetic inputs with padding, and with both token types where a model tells them apart."""
    import torch

    from cofiprune.data.checks import longest_sequence
    from cofiprune.data.synthetic import synthetic_inputs
    from cofiprune.data.tasks import forward_names

    limit = longest_sequence(model) if model.main_input_name == "input_ids" else None
    generator = torch.Generator().manual_seed(0)
    length = min(tokens, limit or tokens)
    inputs = synthetic_inputs(model, batch_size=rows, seq_len=length, generator=generator, padding=True)
    types = getattr(model.config, "type_vocab_size", 0) or 0
    if types > 1 and "token_type_ids" in forward_names(model):
        inputs["token_type_ids"] = torch.randint(2, inputs["input_ids"].shape, generator=generator)
    return inputs


def largest_difference(model: PreTrainedModel, file: Path) -> float:
    """Return the largest difference between torch's outputs and those of the file, in several shapes."""
    import torch

    session = import_module("onnxruntime").InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found = 0.0
    for rows, tokens in _COMPARED:
        inputs = example(model, rows, tokens)
        with torch.no_grad():
            expected = _tensors(model(**inputs))
        given = {entry.name for entry in session.get_inputs()}  # what no output depends on is not among them
        computed = session.run(list(expected), {name: v.numpy() for name, v in inputs.items() if name in given})
        for one, other in zip(expected.values(), computed, strict=True):
            found = max(found, float((one - torch.from_numpy(other)).abs().max()))
    return found


def _tensors(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    from torch import Tensor

    return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


def _open_dimensions(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, dict[int, Any]]:
    """Name the dimensions of each input that the example does not fix."""
    import torch

    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    text = model.main_input_name == "input_ids"
    return {name: {0: batch, **({value.dim() - 1: sequence} if text else {})} for name, value in inputs.items()}

"""`cofiprune export` and `convert`: a model as files of other runtimes; an original CoFi run as a model."""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cofiprune.cli.beside import Beside
from cofiprune.cli.loading import add_data_options, add_task_option, load, load_config, task_by_architecture
from cofiprune.cli.options import at_least, one_of, writable_directory

_FORMATS = ("onnx", "openvino")
_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")
_MODES = ("static", "dynamic", "weights")
_LIBRARY = "sentence_transformers"


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """Add what `export` takes."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="directory or hub name")
    add("out", metavar="OUT", help="a directory; or a file that ends in .onnx, which is then all that is written")
    add("--format", type=one_of(_FORMATS, "format"), nargs="+", default=["onnx"], metavar="{onnx,openvino}",
        help="(default: onnx)")  # fmt: skip
    add("--int8", action="store_true", help="write int8 files as well, the fastest that hold --max-drop")
    add("--int8-mode", type=one_of(_MODES, "kind of int8"), metavar="{" + ",".join(_MODES) + "}",
        help="write int8 files of this kind (default: all are tried)")  # fmt: skip
    add("--max-drop", type=float, metavar="X", help="what the score on the rows may lose by int8, as a fraction")
    add("--opset", type=at_least(18), metavar="N", help="version of ONNX's operators (default: torch's own)")
    add_task_option(parser)
    add_data_options(parser, train=False)
    add("--file", dest="validation_file", default=argparse.SUPPRESS, metavar="FILE",
        help="rows to compare and to score on: the same as --validation-file")  # fmt: skip
    add("--json", action="store_true", help="print the report as JSON")


def add_convert_options(parser: argparse.ArgumentParser) -> None:
    """Add what `convert` takes."""
    add = parser.add_argument
    add("path", metavar="DIR", help="config.json, pytorch_model.bin and, of a run, zs.pt")
    add("out", metavar="OUT", help="directory to write to")
    text = f"{', '.join(_HEADS)} (default: what config.json says)"
    add("--task-head", type=one_of(_HEADS, "head"), metavar="HEAD", help=text)
    add("--json", action="store_true", help="print the result as JSON")


def convert(options: argparse.Namespace) -> None:
    """Write an original CoFi run as an ordinary compacted model, and print its summary."""
    from cofiprune import cofi_checkpoint
    from cofiprune.measure.summary import summary

    model = cofi_checkpoint.convert(options.path, options.out, task_head=options.task_head)
    found = summary(model)
    told = json.dumps({**asdict(found), "sparsity": found.sparsity, "folder": options.out})
    print(told if options.json else f"{found}\n\nsaved in {options.out}")


def export(options: argparse.Namespace) -> None:
    """Write the files, and print how each compares with the model."""
    from cofiprune.export import write

    write.check_packages(options.format)
    out = Path(options.out).expanduser()
    single = out.suffix == ".onnx"
    folder = writable_directory(str(out.parent if single else out), other_than=[options.model])
    config, beside = load_config(options.model), Beside.of(options.model)
    if not single:
        beside.refuse_a_part()
    stated = task_by_architecture(config)
    options.task = options.task or ("feature-extraction" if beside.pools else stated)
    loaded = load(options, labelled=False)
    report = write.export(
        loaded.model,
        out,
        tokenizer=loaded.tokenizer,
        format=options.format,
        int8=options.int8_mode or options.int8,
        dataset=loaded.datasets.get("validation_file"),
        max_drop=options.max_drop,
        modules=_behind(beside, loaded.task),
        opset=options.opset,
    )
    if not single:
        beside.for_task(loaded.task, stated, tokenised=loaded.tokenizer is not None).copy_to(
            folder, loaded.model.config
        )
    print(json.dumps(asdict(report), default=str) if options.json else report)


def _behind(beside: Beside, task: str) -> list[Any]:
    """Load the modules of a sentence-transformers folder that make an embedding."""
    if not beside.pools or task != "feature-extraction":
        return []
    if find_spec(_LIBRARY) is None:
        warnings.warn(
            "without sentence-transformers installed, the files have no output sentence_embedding, only the states "
            "that are pooled for it",
            UserWarning,
            stacklevel=2,
        )
        return []
    from sentence_transformers import SentenceTransformer

    return list(SentenceTransformer(str(beside.source), device="cpu"))[1:]

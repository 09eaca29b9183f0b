"""Measure models on a task: size, sparsity, the task's metrics, and seconds per example.

    python examples/evaluate.py sst2 MODEL --data-dir DIR
    python examples/evaluate.py mnli DENSE COMPACTED ORIGINAL_COFI_FOLDER --data-dir DIR --device cuda
    python examples/evaluate.py squad MODEL --data-dir DIR --max-length 384 -- --doc-stride 64

A model is dense, compacted, or a folder that the original CoFi wrote. Size is the number of parameters in the encoder's
layers: embeddings, pooler and head do not count; sparsity is the share of these that was removed. Seconds per example
are those of the forward pass on full batches of the task's rows, tokenised and on the device before the clock starts.
Options of run_glue, run_squad and run_ner, such as --doc-stride, follow after --.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from evaluation_tasks import TASKS, load, make_task, task_named
from quickstart_data import DataError
from quickstart_model import ModelError
from rich.console import Console
from rich.table import Table
from speed import Speed, speeds

import cofiprune
from cofiprune.cli.models import to_device
from cofiprune.cli.options import Parser, at_least
from cofiprune.timing import cpu_threads

NAME = "evaluate"
TINY_ROWS = 32
Result = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the evaluation; a user's mistake ends in one line and exit code 2."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        results = evaluate(options)
    except (cofiprune.CofipruneError, DataError, ModelError, OSError) as error:
        print(f"{NAME}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(results, indent=1))
    else:
        Console().print(make_table(options.task, results))
    return 0


def evaluate(options: argparse.Namespace) -> list[Result]:
    """Measure each model; the models are timed in turn.

    :raises CofipruneError: for what cannot be loaded or read.
    """
    models = [load(source, options.task) for source in options.models]
    tasks = [make_task(options, source) for source in options.models]
    models = [to_device(model, options.device) for model in models]
    found: list[Result] = []
    with cpu_threads(options.threads):
        for source, model, task in zip(options.models, models, tasks, strict=True):
            size = cofiprune.summary(model)
            found.append(
                {
                    "task": options.task,
                    "model": source,
                    "class": type(model).__name__,
                    "state": size.state,
                    "size": size.layer_parameters,
                    "dense_size": size.dense.layer_parameters,
                    "parameters": size.parameters,
                    "sparsity": size.sparsity,
                    "rows": len(task.validation),
                    "metrics": dict(task.measure(model)),
                }
            )
        timed = speeds(
            models,
            [task.validation for task in tasks],
            batch_size=options.batch_size,
            batches=options.timing_batches,
            runs=options.runs,
            warmup=options.warmup,
        )
        setting = {"device": _device(models[0].device), "threads": torch.get_num_threads()}
    for result, model, speed in zip(found, models, timed, strict=True):
        result.update(_timing(speed), **setting, dtype=str(model.dtype).removeprefix("torch."))
        result["speedup"] = timed[0].seconds_per_example / speed.seconds_per_example
    return found


def make_table(task: str, results: Sequence[Result]) -> Table:
    """One column for each model."""
    first = results[0]
    noun = "thread" if first["threads"] == 1 else "threads"
    threads = f", {first['threads']} {noun}" if first["device"] == "cpu" else ""
    title = (
        f"{task}, {first['rows']:,} rows; {first['device']}{threads}, {first['dtype']}, batch {first['batch_size']} of "
        f"{first['tokens']:.0f} tokens"
    )
    table = Table("model", title=title)
    for result in results:
        table.add_column(result["model"], justify="right", overflow="fold")
    table.add_row("state", *(result["state"] for result in results))
    table.add_row("size: parameters in the layers", *(f"{result['size']:,}" for result in results))
    table.add_row("parameters in all", *(f"{result['parameters']:,}" for result in results))
    table.add_row("sparsity", *(f"{result['sparsity']:.4f}" for result in results))
    for metric in first["metrics"]:
        table.add_row(metric, *(f"{result['metrics'][metric]:.4f}" for result in results))
    table.add_row("seconds per example", *(f"{result['seconds_per_example']:.6f}" for result in results))
    table.add_row("examples per second", *(f"{1 / result['seconds_per_example']:,.1f}" for result in results))
    if len(results) > 1:
        table.add_row("speed-up over the first", *(f"{result['speedup']:.2f}x" for result in results))
    return table


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    :raises CofipruneError: for whatever cannot be understood.
    """
    parser = Parser(prog=NAME, description=(__doc__ or "").partition("\n")[0], epilog=(__doc__ or "").splitlines()[-1])
    add = parser.add_argument
    add("task", metavar="TASK", help=f"{', '.join(TASKS)}; the last two with data of your own")
    add("models", nargs="+", metavar="MODEL", help="folder or hub name of a model with a trained head")
    add("--data-dir", type=Path, metavar="DIR", help="folder with validation.* or dev.* (default: from the hub)")
    add("--validation-file", metavar="FILE", help="for classification: csv, tsv, json, jsonl or parquet with labels")
    add("--max-length", type=at_least(8), metavar="N", help="tokens to which texts are cut (default: 128, SQuAD 384)")
    add("--eval-rows", type=at_least(1), metavar="N", help="validation rows to use, the first ones (default: all)")
    add("--batch-size", type=at_least(1), default=128, metavar="N", help="examples at a time in timing (default: 128)")
    add("--timing-batches", type=at_least(1), default=4, metavar="N",
        help="batches to time, spread evenly over the rows (default: 4)")  # fmt: skip
    add("--runs", type=at_least(1), default=5, metavar="N",
        help="timed passes over each batch, of which the median counts (default: 5)")  # fmt: skip
    add("--warmup", type=at_least(0), default=2, metavar="N", help="passes before the timed ones (default: 2)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    add("--threads", type=at_least(1), metavar="N", help="of the CPU (default: torch's own number)")
    add("--json", action="store_true", help="print JSON: a list with one object for each model")
    add("--tiny", action="store_true", help="few rows, made up where there is no --data-dir, and few passes")
    place = list(argv).index("--") if "--" in argv else len(argv)
    options = parser.parse(list(argv[:place]))
    options.more = list(argv[place + 1 :])
    options.task = task_named(options.task)
    if options.tiny:
        options.eval_rows = options.eval_rows or TINY_ROWS
        options.runs, options.warmup, options.timing_batches = 2, 1, 1
    return options


def _timing(speed: Speed) -> Result:
    return {
        "seconds_per_example": speed.seconds_per_example,
        "batch_size": speed.batch_size,
        "tokens": speed.tokens,
        "timed_batches": speed.batches,
        "runs": speed.runs,
    }


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


if __name__ == "__main__":
    sys.exit(main())

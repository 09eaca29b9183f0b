"""`cofiprune evaluate` and `cofiprune benchmark`."""

from __future__ import annotations

import argparse
import json

from cofiprune.cli.loading import add_data_options, load
from cofiprune.cli.models import add_model_options, load_model, model_name, to_device
from cofiprune.cli.parser import UsageError, at_least, number, one_of

_PRECISIONS = ("float32", "bfloat16", "float16")


def add_evaluate_options(parser: argparse.ArgumentParser) -> None:
    """Add what `evaluate` takes."""
    add_model_options(parser)
    add_data_options(parser, train=False)
    parser.add_argument("--batch-size", type=at_least(1), default=32, metavar="N", help="rows at a time (default: 32)")
    parser.add_argument(
        "--seed", type=int, default=57, metavar="N", help="of masked tokens, for masked-lm (default: 57)"
    )
    _add_output_options(parser)


def add_benchmark_options(parser: argparse.ArgumentParser) -> None:
    """Add what `benchmark` takes."""
    add_model_options(parser)
    add = parser.add_argument
    add("--baseline", metavar="NAME", help="a model to measure in turn with it, for the speed-up")
    add("--batch-size", type=at_least(1), nargs="+", default=[1, 32], metavar="N", help="(default: 1 32)")
    add("--seq-len", type=at_least(1), nargs="+", default=[128], metavar="N", help="tokens per example (default: 128)")
    add("--runs", type=at_least(1), metavar="N", help="timed passes (default: at least 5, and more within --seconds)")
    add("--warmup", type=at_least(0), default=3, metavar="N", help="passes before the timed ones (default: 3)")
    add("--seconds", type=number, default=5.0, metavar="X", help="time for each size (default: 5)")
    add("--threads", type=at_least(1), metavar="N", help="of the CPU (default: torch's own number)")
    add("--dtype", type=one_of(_PRECISIONS, "precision"), default="float32", metavar="{" + ",".join(_PRECISIONS) + "}",
        help="precision to measure in (default: float32)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="of the made-up inputs (default: 0)")
    _add_output_options(parser)


def evaluate(options: argparse.Namespace) -> None:
    """Print the metrics of a model on a file."""
    if options.validation_file is None:
        raise UsageError("evaluate needs --validation-file")
    loaded = load(options, labelled=True)
    from transformers import set_seed

    from cofiprune.measure import evaluation

    set_seed(options.seed)
    rows = loaded.datasets["validation_file"]
    model = to_device(loaded.model, options.device)
    found = evaluation.evaluate(model, rows, batch_size=options.batch_size, data_collator=loaded.collator)
    if options.json:
        print(json.dumps({**found, "rows": len(rows)}))
        return
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value:.4f}")
    print(f"{'rows':<{width}}  {len(rows)}")


def benchmark(options: argparse.Namespace) -> None:
    """Print latency and throughput."""
    import torch

    from cofiprune.measure.benchmark import benchmark as measure

    dtype = getattr(torch, options.dtype)
    names = [model_name(options), *([options.baseline] if options.baseline else [])]
    models = [to_device(load_model(name, options.task, dtype=dtype), options.device) for name in names]
    report = measure(
        *models,
        batch_size=options.batch_size,
        seq_len=options.seq_len,
        runs=options.runs,
        warmup=options.warmup,
        seconds=options.seconds,
        threads=options.threads,
        seed=options.seed,
    )
    print(json.dumps(report.to_dict()) if options.json else report)


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--json", action="store_true", help="print JSON")

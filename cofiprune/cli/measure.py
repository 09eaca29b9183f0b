"""`cofiprune evaluate`, `benchmark` and `inspect`: what a model scores, how fast it is, and what it is made of."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cofiprune.cli.loading import add_data_options, add_model_options, load, load_model, model_name, to_device
from cofiprune.cli.options import UsageError, at_least, one_of
from cofiprune.structure import UNIT_KINDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cofiprune.structure import Structure

_PRECISIONS = ("float32", "bfloat16", "float16")


def add_evaluate_options(parser: argparse.ArgumentParser) -> None:
    """Add what `evaluate` takes."""
    add_model_options(parser)
    add_data_options(parser, train=False)
    add = parser.add_argument
    add("--batch-size", type=at_least(1), default=32, metavar="N", help="examples per batch (default: 32)")
    add("--seed", type=int, default=57, metavar="N", help="seed of the masked tokens, for masked-lm (default: 57)")
    _add_output_options(parser)


def add_benchmark_options(parser: argparse.ArgumentParser) -> None:
    """Add what `benchmark` takes."""
    add_model_options(parser)
    add = parser.add_argument
    add("--baseline", metavar="NAME", help="model to measure in turn with it, for the speed-up")
    add("--batch-size", type=at_least(1), nargs="+", default=[1, 32], metavar="N", help="(default: 1 32)")
    add("--seq-len", type=at_least(1), nargs="+", default=[128], metavar="N", help="tokens per example (default: 128)")
    add("--runs", type=at_least(1), metavar="N", help="timed passes (default: at least 5, and more within --seconds)")
    add("--seconds", type=float, default=5.0, metavar="X", help="time for each size (default: 5)")
    add("--threads", type=at_least(1), metavar="N", help="threads of the CPU (default: torch's own number)")
    add("--dtype", type=one_of(_PRECISIONS, "precision"), default="float32", metavar="{" + ",".join(_PRECISIONS) + "}",
        help="precision to measure in (default: float32)")  # fmt: skip
    _add_output_options(parser)


def add_inspect_options(parser: argparse.ArgumentParser) -> None:
    """Add what `inspect` takes."""
    add_model_options(parser)
    add = parser.add_argument
    add("--seq-len", type=at_least(1), default=128, metavar="N", help="tokens to count MACs for (default: 128)")
    add("--json", action="store_true", help="print JSON")
    add("--write-adapter", metavar="FILE", help="derive the family from the model and write its adapter file")


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--json", action="store_true", help="print JSON")


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
    settings = ("batch_size", "seq_len", "runs", "seconds", "threads")
    report = measure(*models, **{name: getattr(options, name) for name in settings})
    print(json.dumps(report.to_dict()) if options.json else report)


def inspect(options: argparse.Namespace) -> None:
    """Print size and structure."""
    model = load_model(model_name(options), options.task)
    if options.write_adapter:
        _write_adapter(model, Path(options.write_adapter))
        return
    from cofiprune.accounting import layer_parameters, model_parameters
    from cofiprune.adapter import structure as structure_of
    from cofiprune.measure.summary import summary
    from cofiprune.selection.reachable import reachable

    structure, report = structure_of(model), summary(model, seq_len=options.seq_len)
    cost, sizes = model_parameters(structure), structure.sizes
    # Parameters of a group are those that go when it goes and everything else stays.
    groups = [(name, size, cost.exact(sizes) - cost.exact({**sizes, name: 0})) for name, size in sizes.items()]
    highest = reachable(structure, layer_parameters(structure)).highest if sizes else 0.0
    if options.json:
        entries = {
            **asdict(report),
            "sparsity": report.sparsity,
            "model_sparsity": report.model_sparsity,
            "groups": [dict(zip(("name", "units", "parameters"), group, strict=True)) for group in groups],
            "refused": dict(structure.refused),
            "highest_sparsity": highest,
        }
        print(json.dumps(entries))
        return
    from cofiprune.measure.report import as_text, rich_table

    rows = [[name, f"{size:,}", f"{count:,}", f"{count / size:,.0f}"] for name, size, count in groups]
    table = as_text(rich_table(["group", "units", "parameters of it", "per unit"], rows))
    print(report, table, "\n".join(_verdict(structure, highest)), sep="\n\n")


def _verdict(structure: Structure, highest: float) -> list[str]:
    """Say what can be pruned, how far, and what cannot and why."""
    present = [unit for unit in UNIT_KINDS if any(group.unit == unit for group in structure.groups)]
    how = "declared" if structure.table is None else "derived from the model, and proved on it"
    far = f"; up to a sparsity of {highest:.4f}" if present else ""
    return [
        f"family: {structure.family}, {how}",
        f"can be pruned: {', '.join(present) or 'nothing'}{far}",
        *(
            f"cannot be pruned: {unit}: {structure.refused.get(unit, 'no such units are left')}"
            for unit in UNIT_KINDS
            if unit not in present
        ),
    ]


def _write_adapter(model: PreTrainedModel, file: Path) -> None:
    """Write what is derived from a model as an adapter file.

    :raises UsageError: when there is such a file already, which may have been edited.
    """
    from cofiprune.derivation.source import written_adapter

    if file.exists():
        raise UsageError(f"{file} exists; name another file, or remove it")
    file.write_text(written_adapter(model), encoding="utf-8")
    print(f"{file}: the adapter of {model.config.model_type}. Edit it, check it with cofiprune.check_adapter(adapter),")
    print("and register it with cofiprune.register_adapter(adapter).")

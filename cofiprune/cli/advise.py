"""`cofiprune advise`: what the ways to make a model smaller cost on the user's rows, in one table and one sentence."""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from cofiprune.cli.loading import Loaded, add_data_options, add_model_options, load
from cofiprune.cli.options import UsageError, numbers

if TYPE_CHECKING:
    from cofiprune.measure.figures import Figures, Subject

_SIZES = (0.5, 0.7, 0.9)
_HELD_OUT = 5
"""One row of so many is held out, where no validation file is given."""
_LOWER_IS_BETTER = ("mse", "perplexity")


def add_advise_options(parser: argparse.ArgumentParser) -> None:
    """Add what `advise` takes."""
    essential = parser.add_argument_group("essential")
    add_model_options(parser, essential)
    add_data_options(parser, train=True, files=essential)
    add = essential.add_argument
    add("--target-sparsity", type=numbers, default=list(_SIZES), metavar="X,X,...",
        help=f"sizes to prune to (default: {','.join(map(str, _SIZES))})")  # fmt: skip
    add("--max-drop", type=float, default=0.01, metavar="X", help="what the score may lose (default: 0.01)")
    add("--int8", action=argparse.BooleanOptionalAction, default=True, help="try the dense model in int8 (default: on)")
    add("--json", action="store_true", help="print JSON")


def advise(options: argparse.Namespace) -> None:
    """Try each way on the rows, and print the table and the advice; nothing is written."""
    if options.train_file is None:
        raise UsageError("advise needs --train-file: the rows that the model is pruned and measured on")
    loaded = load(options, labelled=True)
    train, held = loaded.datasets["train_file"], loaded.datasets.get("validation_file")
    if held is None:
        held = train[::_HELD_OUT]
        train = [row for index, row in enumerate(train) if index % _HELD_OUT]
    found = _figures(options, loaded, train, held)
    metric = next((name for name in found["dense"].metrics if name != "loss"), "loss")
    sentence = _advice(found, metric, options.max_drop)
    if options.json:
        print(json.dumps({"rows": {name: asdict(each) for name, each in found.items()}, "advice": sentence}))
        return
    from cofiprune.measure.report import as_text, rich_table

    rows = [
        [name, f"{each.metrics[metric]:.4f}", f"{each.megabytes:.1f} MB",
         "" if each.latency_ms is None else f"{each.latency_ms:.2f} ms"]
        for name, each in found.items()
    ]  # fmt: skip
    print(as_text(rich_table(["", metric, "weights", "latency"], rows)))
    print(f"\n{sentence}\n{found['dense'].setting}; without training, which brings some of what is lost back.")


def _figures(options: argparse.Namespace, loaded: Loaded, train: list[Any], held: list[Any]) -> dict[str, Figures]:
    """Measure the dense model and what each way leaves of it."""
    from cofiprune.measure.figures import figures_of

    subjects = dict(_subjects(options, loaded, train, held))
    found = dict(zip(subjects, figures_of(*subjects.values()), strict=True))
    return found | _in_int8(options, loaded, found["dense"], held)


def _subjects(
    options: argparse.Namespace, loaded: Loaded, train: list[Any], held: list[Any]
) -> Iterator[tuple[str, Subject]]:
    """Give the dense model, the one with every other layer, and those that are pruned."""
    import torch

    from cofiprune.adapter import structure as structure_of
    from cofiprune.compaction import compact
    from cofiprune.measure.evaluation import evaluate
    from cofiprune.measure.figures import Subject
    from cofiprune.plan import Plan
    from cofiprune.training.prune import prune

    def measured(model: Any) -> Subject:
        return Subject(model, structure_of(model), evaluate(model, held, data_collator=loaded.collator))

    model = loaded.model
    structure = structure_of(model)
    yield "dense", measured(model)
    gone = [f"layers.{index}.{block}" for index in range(1, len(structure.layers), 2) for block in ("attention", "ffn")]
    if gone and all(name in structure for name in gone):
        plan = Plan.from_values(structure, {name: torch.zeros(1) for name in gone})
        yield "every other layer", measured(compact(model, plan))
    asked = options.target_sparsity
    targets: list[float] = asked if isinstance(asked, list) else [asked]
    for target in targets:
        settings: dict[str, Any] = {"method": "one-shot", "finetune_epochs": 0, "progress": not options.json}
        small = prune(copy.deepcopy(model), train, target_sparsity=target, data_collator=loaded.collator, **settings)
        yield f"pruned to {target:g}", measured(small.compact())


def _in_int8(options: argparse.Namespace, loaded: Loaded, dense: Figures, held: list[Any]) -> dict[str, Figures]:
    """Measure the dense model in int8, where its packages are installed."""
    if not options.int8:
        return {}
    from dataclasses import replace

    from cofiprune.errors import SettingsError
    from cofiprune.export.write import check_packages, export

    try:
        check_packages(["onnx"])
    except SettingsError as error:
        warnings.warn(f"int8 is left out: {error}", UserWarning, stacklevel=2)
        return {}

    with TemporaryDirectory() as folder:
        report = export(loaded.model, Path(folder), int8="dynamic", dataset=held)
        file = next(file for file in report.values() if file.kind == "onnx-int8")
        time = _milliseconds(file.path, loaded.model, dense)
    metric = next((name for name in dense.metrics if name != "loss"), "loss")
    return {"dense in int8": replace(dense, megabytes=file.megabytes, latency_ms=time, metrics={metric: file.score})}


def _milliseconds(file: Path, model: Any, like: Figures) -> float:
    """Time a graph on one batch as the models were."""
    import numpy as np
    import torch

    from cofiprune.data.synthetic import synthetic_inputs
    from cofiprune.export.sessions import feed_of
    from cofiprune.timing import in_turn

    session = import_module("onnxruntime").InferenceSession(str(file), providers=["CPUExecutionProvider"])
    made = synthetic_inputs(model, batch_size=like.batch_size, seq_len=like.seq_len)
    names = {entry.name for entry in session.get_inputs()}
    arrays = feed_of({name: value.cpu() for name, value in made.items()}, names)
    (times,) = in_turn([lambda: session.run(None, arrays)], torch.device("cpu"), warmup=1, seconds=0.5)
    return 1e3 * float(np.median(times))


def _advice(found: dict[str, Figures], metric: str, max_drop: float) -> str:
    """Say which way is smallest among those that keep the score."""
    sign = -1 if metric in (*_LOWER_IS_BETTER, "loss") else 1
    least = sign * found["dense"].metrics[metric] - max_drop
    kept = {name: each for name, each in found.items() if sign * each.metrics[metric] >= least and name != "dense"}
    if not kept:
        return (
            f"Nothing keeps {metric} within {max_drop:g} of the dense model without training: prune with a teacher "
            "and some epochs, cofiprune prune MODEL --teacher self --finetune-epochs 3"
        )
    name = min(kept, key=lambda each: kept[each].megabytes)
    both = f"{kept[name].metrics[metric]:.4f} at {kept[name].megabytes:.1f} MB"
    return f"Take {name}: {metric} {both}, where the dense model has {found['dense'].metrics[metric]:.4f}."

"""What a run of `prune` or `finetune` would do, said without doing it: `--dry-run`."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cofiprune.cli.loading import Loaded
    from cofiprune.training.config import PruneConfig

_TIMES = ("target_speedup", "target_latency_ms")
"""Targets that would have to be measured."""


def print_outlook(
    options: argparse.Namespace, loaded: Loaded, arguments: dict[str, Any], target: dict[str, Any]
) -> None:
    """Check the target against the model, and print rows, steps, method, and where things would go.

    :param arguments: of the run.
    :param target: the value of the argument that asks for one, by its name; empty for `finetune`.
    :raises CofipruneError: where the run would.
    """
    found = outlook(options, loaded, arguments, target)
    if options.json:
        print(json.dumps(found))
        return
    width = max(map(len, found))
    print("\n".join(f"{name.replace('_', ' '):<{width}}  {value}" for name, value in found.items()))
    print("nothing was done: leave --dry-run out to run it")


def outlook(
    options: argparse.Namespace, loaded: Loaded, arguments: dict[str, Any], target: dict[str, Any]
) -> dict[str, Any]:
    """Return what a run would do, as plain values by name."""
    from cofiprune.adapter import structure as structure_of

    model, rows, bare = loaded.model, loaded.datasets.get("train_file", []), loaded.datasets.get("unlabelled_file", [])
    config, method, teacher = _picked(loaded, arguments, target)
    per_epoch = math.ceil((len(rows) + len(bare)) / (config.batch_size * config.gradient_accumulation_steps))
    epochs = {"training": 2.0 if config.finetune_epochs is None else config.finetune_epochs}
    if target:
        gated = 0.0 if config.decides_in_one_shot or not rows else config.pruning_epochs
        epochs = {"pruning": gated, "recovery": config.recovery_epochs if rows else 0.0}
    steps = ", ".join(f"{round(length * per_epoch)} of {phase}" for phase, length in epochs.items())
    folder = None if options.output_dir is None else Path(options.output_dir)
    there = "is there already" if folder is not None and folder.exists() else "would be made"
    return {
        "model": f"{type(model).__name__} ({structure_of(model).family}), {model.num_parameters():,} parameters",
        "task": loaded.task,
        "training_rows": len(rows),
        **({"unlabelled_rows": len(bare)} if bare else {}),
        "validation_rows": len(loaded.datasets.get("validation_file", [])),
        "batch_size": config.batch_size,
        "steps": f"{steps}; {per_epoch} an epoch",
        **({"target": ", ".join(f"{name} {value}" for name, value in target.items())} if target else {}),
        **({"method": method} if target else {}),
        "teacher": options.teacher or ("self" if teacher == "self" else "none"),
        "output_dir": "none yet: a run needs --output-dir" if folder is None else f"{folder}, which {there}",
    }


def _picked(loaded: Loaded, arguments: dict[str, Any], target: dict[str, Any]) -> tuple[PruneConfig, str, Any]:
    """Check rows and target as the run does; return its configuration, its method in words, and its teacher.

    A target in time would have to be measured, and so the method that is picked for it.
    """
    from cofiprune.data.mixed import Mixed
    from cofiprune.data.prepare import prepare
    from cofiprune.training.arguments import resolve_teacher
    from cofiprune.training.run import Run
    from cofiprune.training.settling import pick_method, settled, taught_by
    from cofiprune.whole import Whole

    config, teacher, collator = arguments["config"], arguments["teacher"], loaded.collator
    rows = Mixed.of(loaded.datasets.get("train_file"), loaded.datasets.get("unlabelled_file"))
    timed = any(name in _TIMES for name in target)
    if timed or not target:
        if rows is not None:
            needs_labels = teacher is None and (not target or config.trains_weights)
            settings = {"batch_size": config.batch_size, "need_labels": needs_labels, "collator": collator}
            prepare(rows, loaded.model, name="train_dataset", **settings)
        later = ", picked when times are measured" if timed and config.method == "auto" else ""
        return config, f"{config.method}{later}", teacher
    ((name, asked),) = target.items()
    whole = Whole.of(loaded.model)
    structure, config, targets, reason = settled(whole, config, name, asked, on_data=rows is not None, keep_width=False)
    teacher = taught_by(teacher, whole, config, rows, collator, keep_width=False, picked=bool(reason))
    if rows is None:
        return config, "no data", teacher
    run = Run(
        whole.model, structure, config, targets[0], resolve_teacher(teacher, whole.model), teacher == "self",
        rows, arguments["eval_dataset"], collator, None, None, (), False, reason,
    )  # fmt: skip
    run.prepare()
    if config.method == "auto":
        pick_method(run, targets[0])
    return run.config, run.reason or run.config.method, teacher

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


def print_outlook(options: argparse.Namespace, loaded: Loaded, config: PruneConfig, target: dict[str, Any]) -> None:
    """Check the target against the model, and print rows, steps, method, and where things would go.

    :param target: the value of the argument that asks for one, by its name; empty for `finetune`.
    :raises CofipruneError: where the run would.
    """
    found = outlook(options, loaded, config, target)
    if options.json:
        print(json.dumps(found))
        return
    width = max(map(len, found))
    print("\n".join(f"{name.replace('_', ' '):<{width}}  {value}" for name, value in found.items()))
    print("nothing was done: leave --dry-run out to run it")


def outlook(options: argparse.Namespace, loaded: Loaded, config: PruneConfig, target: dict[str, Any]) -> dict[str, Any]:
    """Return what a run would do, as plain values by name."""
    from cofiprune.adapter import structure as structure_of
    from cofiprune.data.mixed import Mixed
    from cofiprune.data.prepare import prepare

    model, rows, bare = loaded.model, loaded.datasets.get("train_file", []), loaded.datasets.get("unlabelled_file", [])
    structure = structure_of(model)
    per_epoch = math.ceil((len(rows) + len(bare)) / (config.batch_size * config.gradient_accumulation_steps))
    if rows:
        needs_labels = options.teacher is None and (not target or config.trains_weights)
        settings = {"batch_size": config.batch_size, "need_labels": needs_labels, "collator": loaded.collator}
        prepare(Mixed(rows, bare) if bare else rows, model, name="train_dataset", **settings)
    epochs = {"training": 2.0 if config.finetune_epochs is None else config.finetune_epochs}
    if target:
        gated = 0.0 if config.decides_in_one_shot or not rows else config.pruning_epochs
        epochs = {"pruning": gated, "recovery": config.recovery_epochs if rows else 0.0}
        _check_target(options, loaded, config, target)
    steps = ", ".join(f"{round(length * per_epoch)} of {phase}" for phase, length in epochs.items())
    folder = Path(options.output_dir)
    return {
        "model": f"{type(model).__name__} ({structure.family}), {model.num_parameters():,} parameters",
        "task": loaded.task,
        "training_rows": len(rows),
        **({"unlabelled_rows": len(bare)} if bare else {}),
        "validation_rows": len(loaded.datasets.get("validation_file", [])),
        "batch_size": config.batch_size,
        "steps": f"{steps}; {per_epoch} an epoch",
        **({"target": ", ".join(f"{name} {value}" for name, value in target.items())} if target else {}),
        **({"method": config.method if rows else "no data"} if target else {}),
        "teacher": options.teacher or "none",
        "output_dir": f"{folder}, which {'is there already' if folder.exists() else 'would be made'}",
    }


def _check_target(options: argparse.Namespace, loaded: Loaded, config: PruneConfig, target: dict[str, Any]) -> None:
    """Make sure that the model can reach a target; one in time would have to be measured."""
    from cofiprune.adapter import structure as structure_of
    from cofiprune.selection.reachable import check_target
    from cofiprune.training.arguments import target_for

    ((name, asked),) = target.items()
    if name in ("target_speedup", "target_latency_ms"):
        return
    structure = structure_of(loaded.model)
    for value in asked if isinstance(asked, list) else [asked]:
        check_target(structure, target_for(loaded.model, structure, config, name, value), config.units)

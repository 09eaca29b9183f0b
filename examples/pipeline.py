"""The steps of a training example: a teacher, pruning or fine-tuning, saving, reloading, measuring."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from accelerate import PartialState
from results import Result, finish, finished, resumable, say
from transformers import PreTrainedModel

import cofiprune
from cofiprune.errors import CheckpointError
from cofiprune.selection.reachable import check_target
from cofiprune.selection.target import Target

if TYPE_CHECKING:
    from common import Task

TEACHER = "teacher"
"""Folder in the output folder."""
BENCHMARK_SECONDS, TINY_BENCHMARK_SECONDS = 5.0, 0.2
NO_MATTER = {"progress", "logging_steps", "eval_steps", "checkpoint_steps"}
"""Settings that may change between the parts of a run."""


@dataclass
class Dense:
    """The model that a result is compared with: the teacher, or without one the model before pruning."""

    name: str
    """How the teacher was asked for: a source, "self", "train" or "none"."""
    source: str | None
    """Where it is loaded from; None where there is nothing to compare with."""
    model: PreTrainedModel | None
    seconds: float | None = None
    """Its training took."""
    metrics: dict[str, float] | None = None
    """None until they are measured."""


def prepare_dense(options: argparse.Namespace, task: "Task", config: cofiprune.PruneConfig) -> Dense:
    """Load the teacher that the options name, after training it if that is asked for."""
    pruned, name = options.pretrained_pruned_model, options.teacher
    prunes = pruned is None and options.target_sparsity is not None
    if name is None:
        beside = None if pruned is None else Path(pruned).expanduser() / TEACHER
        name = "train" if prunes else str(beside) if beside is not None and beside.is_dir() else "none"
    seconds, source = None, name
    if name == "train":
        source = str(options.output_dir / TEACHER)
        seconds = train_teacher(options, task, config)["seconds"]
    elif name == "self":
        source = pruned or options.model
    elif name == "none":
        source = options.model if prunes else None
    model = None if source is None else new_model(options, task, source)
    if name != "none":
        say(f"Teacher: {source}")
    return Dense(name, source, model, seconds)


def train_teacher(options: argparse.Namespace, task: "Task", config: cofiprune.PruneConfig) -> Result:
    """Fine-tune the model as it comes and keep it in the output folder; one that is there is used again."""
    folder: Path = options.output_dir / TEACHER
    changes = {
        "finetune_epochs": options.teacher_epochs,
        "finetune_learning_rate": options.teacher_learning_rate,
        "finetune_lr_scheduler_type": "linear",
        "finetune_batch_size": None,
        "label_weight": None,
        "train_embeddings": None,
    }
    config = cofiprune.PruneConfig.create(config, **changes)
    identity = identity_of(options, task, options.model, "none", None, config)
    done = finished(folder, identity)
    if done is None:
        say(f"Training a teacher on {len(task.train):,} rows ...")
        model = new_model(options, task, options.model)
        if options.target_sparsity is not None:  # before hours of training, not after them
            structure = cofiprune.structure(model)
            check_target(structure, Target.of(structure, options.target_sparsity), config.units)
        trained = cofiprune.finetune(model, task.train, **training(options, task, config, folder))
        if PartialState().is_main_process:
            save(model, task, folder)
            finish(folder, {"identity": identity, "seconds": trained.seconds, "metrics": trained.metrics})
        PartialState().wait_for_everyone()
        done = finished(folder)
        assert done is not None
    return done


def run_once(
    options: argparse.Namespace,
    task: "Task",
    config: cofiprune.PruneConfig,
    folder: Path,
    dense: Dense,
    pruned: str | None = None,
) -> Result:
    """Prune, or fine-tune what is pruned; save, reload and measure. A run that is finished is read instead.

    :param pruned: a pruned model to fine-tune.
    :param folder: for checkpoints, the model and result.json.
    """
    target = None if pruned is not None else options.target_sparsity
    start = pruned or (dense.source if dense.name == "train" and target is not None else None) or options.model
    identity = identity_of(options, task, start, dense.name, target, config)
    PartialState().wait_for_everyone()  # before one of them writes what the others look for
    done = finished(folder, identity)
    if done is not None:
        say(f"{folder}: finished earlier")
        return done
    student = new_model(options, task, start)
    taught_by = {"none": None, "self": "self"}.get(dense.name, dense.model)
    arguments: dict[str, Any] = {**training(options, task, config, folder), "teacher": taught_by}
    if target is not None:
        say(f"Pruning {start} to a sparsity of {target:g}, on {len(task.train):,} rows ...")
        trained = cofiprune.prune(student, task.train, target_sparsity=target, **arguments)
    else:
        say(f"Fine-tuning {start} on {len(task.train):,} rows ...")
        trained = cofiprune.finetune(student, task.train, **arguments)
    if PartialState().is_main_process:
        save(student if target is None else trained.compact(), task, folder)
        say(f"Saved in {folder}; measuring what is loaded from there ...")
        measured = measure(options, task, new_model(options, task, str(folder)), dense)
        result = {
            "identity": identity,
            "folder": str(folder),
            "headline": task.headline,
            **measured,
            "seconds": trained.seconds,
            "best_step": trained.best_step,
            "evaluations": trained.metrics,
        }
        finish(folder, result)
    PartialState().wait_for_everyone()
    done = finished(folder)
    assert done is not None
    return done


def training(options: argparse.Namespace, task: "Task", config: cofiprune.PruneConfig, folder: Path) -> dict[str, Any]:
    """The arguments that `prune` and `finetune` have in common."""
    return {
        "eval_dataset": task.validation,
        "data_collator": task.collator,
        "compute_metrics": task.compute_metrics,
        "config": config,
        "output_dir": folder,
        "resume": (options.resume or options.grid) and resumable(folder),
    }


def measure(options: argparse.Namespace, task: "Task", model: PreTrainedModel, dense: Dense) -> Result:
    """Metrics, size and speed of a model, beside those of the dense one."""
    taught = dense.name != "none" and dense.model is not None
    if dense.metrics is None:
        if dense.model is not None:
            dense.model.to(model.device)
        dense.metrics = dict(task.measure(dense.model)) if taught and dense.model is not None else {}
    now = cofiprune.summary(model)
    before = now.dense if dense.model is None else cofiprune.summary(dense.model)
    speed: list[dict[str, Any]] = []
    if options.benchmark and dense.model is not None:
        seconds = TINY_BENCHMARK_SECONDS if options.tiny else BENCHMARK_SECONDS
        length = task.seq_len or options.max_length
        report = cofiprune.benchmark(model, dense.model, batch_size=(1, 32), seq_len=length, seconds=seconds)
        for row in report.rows:
            assert row.baseline is not None
            times = {"ms": row.model.median_ms, "dense_ms": row.baseline.median_ms, "speedup": row.speedup}
            speed.append({"batch_size": row.batch_size, "seq_len": row.seq_len, **times})
    sizes = ("layer_parameters", "parameters_without_embeddings", "parameters")
    return {
        "metrics": dict(task.measure(model)),
        **{name: getattr(now, name) for name in sizes},
        "sparsity": now.sparsity,
        "model_sparsity": now.model_sparsity,
        "speed": speed,
        "dense": {
            "metrics": dense.metrics,
            **{name: getattr(before, name) for name in sizes},
            "seconds": dense.seconds,
        },
    }


def new_model(options: argparse.Namespace, task: "Task", source: str) -> PreTrainedModel:
    """Load a model for the task, on the device of this process; a new head is always the same one."""
    transformers.set_seed(options.seed)
    model = task.new_model(source)
    model.to(PartialState().device)
    return model


def save(model: PreTrainedModel, task: "Task", folder: Path) -> None:
    """Write a model with its tokenizer."""
    model.save_pretrained(folder)
    if task.tokenizer is not None:
        task.tokenizer.save_pretrained(folder)


def identity_of(
    options: argparse.Namespace,
    task: "Task",
    start: str,
    teacher: str,
    target: float | None,
    config: cofiprune.PruneConfig,
) -> dict[str, Any]:
    """What tells a run from others; folders inside the output folder by their names there."""
    output = options.output_dir.resolve()
    place = Path(start).expanduser().resolve()
    return {
        "task": task.name,
        "model": place.relative_to(output).as_posix() if place.is_relative_to(output) else start,
        "teacher": teacher,
        "target_sparsity": target,
        "train_rows": len(task.train),
        "eval_rows": len(task.validation),
        "max_length": options.max_length,
        **task.settings,
        **config.model_dump(mode="json", exclude=NO_MATTER),
    }


def check_free(folder: Path) -> None:
    """Make sure that no finished run is overwritten.

    :raises CheckpointError: when there is one.
    """
    if finished(folder) is not None:
        raise CheckpointError(
            f"{folder} holds a finished run: choose another --output-dir, or see its result again with --resume"
        )

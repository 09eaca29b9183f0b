"""`cofiprune prune` and `cofiprune finetune`."""

from __future__ import annotations

import argparse
import json
import shlex
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cofiprune.cli.loading import (
    Loaded,
    add_data_options,
    add_model_options,
    load,
    load_config,
    load_model,
    model_name,
    task_by_architecture,
)
from cofiprune.cli.options import UsageError, add_settings, given_settings, numbers, one_of, writable_directory
from cofiprune.cli.outlook import print_outlook
from cofiprune.errors import SettingsError
from cofiprune.training.config import FINETUNE, PRESETS, RECOVERY, PruneConfig
from cofiprune.training.settings import DistillationSettings, GateSettings, TargetSettings, TrainingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cofiprune.training.result import PruneResult
    from cofiprune.training.sweep import SweepResult

    Teacher = PreTrainedModel | Literal["self"] | None

TARGETS = {
    "target_sparsity": "share of the parameters of the encoder's layers to remove, in (0, 1) (default: 0.9); "
    "several, joined by commas, give a model each, in folders of their own",
    "target_model_sparsity": "share of all parameters to remove, in (0, 1)",
    "target_macs": "multiply-accumulates to keep, at --target-seq-len tokens",
    "target_file_mb": "MB that the saved model may have, embedding tables included, in --target-file-dtype",
    "target_speedup": "times faster on this device, measured at --target-batch-size and --target-seq-len",
    "target_latency_ms": "milliseconds per batch on this device, measured likewise",
}


def add_prune_options(parser: argparse.ArgumentParser) -> None:
    """Add what `prune` takes, what most runs need first."""
    essential = _add_essential(parser)
    targets = parser.add_argument_group("other targets (one at most)")
    for name, text in TARGETS.items():
        kind, group = (numbers, essential) if name == "target_sparsity" else (float, targets)
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="X", help=text)
    _add_run_options(parser)
    parser.add_argument("--preset", type=one_of(PRESETS, "preset"), metavar="{" + ",".join(PRESETS) + "}",
                        help="settings of the original's recipe; settings that are given go on top")  # fmt: skip
    add_settings(parser, TargetSettings, GateSettings, DistillationSettings, TrainingSettings)


def add_finetune_options(parser: argparse.ArgumentParser) -> None:
    """Add what `finetune` takes; of two settings that mean the same there, one is shown."""
    _add_essential(parser)
    _add_run_options(parser)
    add_settings(parser, *FINETUNE, hidden=RECOVERY)


def _add_essential(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    essential = parser.add_argument_group("essential")
    add_model_options(parser, essential)
    add_data_options(parser, train=True, files=essential)
    add = essential.add_argument
    add("--output-dir", metavar="DIR", help="where the model, the result and checkpoints go")
    add("--teacher", metavar="NAME", help="a model to learn from, or self: a frozen copy (default: none)")
    add("--unlabelled-file", metavar="FILE", help="further rows, of which a teacher's outputs alone are learned")
    return essential


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--dry-run", action="store_true", help="check everything, say what would be done, and do nothing")
    add("--config", metavar="FILE", help="options by name, in JSON or YAML, or the result.json of a run")
    add(
        "--resume", nargs="?", const=True, default=False, choices=["auto"],
        help="go on from the newest checkpoint in the output directory; with 'auto', where there is one",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="write over a finished model in the output directory")
    add("--keep-checkpoints", action="store_true", help="leave the checkpoints when the model is written")
    add("--json", action="store_true", help="print the result as JSON")


def prune(options: argparse.Namespace) -> None:
    """Prune a model, save the smaller one, and print the result and its summary."""
    given = given_settings(options)
    config = PruneConfig.preset(options.preset, **given) if options.preset else PruneConfig.create(**given)
    from cofiprune.selection.target import parse_target

    target: dict[str, Any] = dict([parse_target({name: getattr(options, name) for name in TARGETS})])
    loaded, arguments = _prepare(options, config, labelled=options.teacher is None)
    if options.dry_run:
        print_outlook(options, loaded, arguments, target)
        return
    from cofiprune.training import prune as training
    from cofiprune.training.sweep import SweepResult

    result = training.prune(loaded.model, loaded.datasets.get("train_file"), **target, **arguments)
    if isinstance(result, SweepResult):
        _save_sweep(result, loaded, options)
    else:
        _save(result, loaded, options)


def finetune(options: argparse.Namespace) -> None:
    """Train a model, save it, and print the result."""
    if options.train_file is None:
        raise SettingsError("finetune needs --train-file")
    config = PruneConfig.for_finetune(**given_settings(options))
    loaded, arguments = _prepare(options, config, labelled=not options.teacher, trained=True)
    if options.dry_run:
        print_outlook(options, loaded, arguments, {})
        return
    from cofiprune.training import prune as training

    result = training.finetune(loaded.model, loaded.datasets["train_file"], **arguments)
    _save(result, loaded, options)


def _prepare(
    options: argparse.Namespace, config: PruneConfig, *, labelled: bool, trained: bool = False
) -> tuple[Loaded, dict[str, Any]]:
    """Load the model with its data and its teacher, and return the arguments that `prune` and `finetune` share."""
    name, taught_by = model_name(options), options.teacher
    if options.output_dir is None and not options.dry_run:
        raise UsageError("--output-dir is missing: where the model, the result and checkpoints go")
    folder = None
    if options.output_dir is not None:
        folder = writable_directory(options.output_dir, other_than=(name, taught_by))
    from transformers import set_seed

    from cofiprune.files import check_unfinished
    from cofiprune.training.checkpoint import has_checkpoints

    if folder is not None and not options.overwrite and not (options.resume and has_checkpoints(folder)):
        check_unfinished(folder)
    set_seed(config.seed)
    loaded = load(options, labelled=labelled, trained=trained)
    stated, tokenised = task_by_architecture(loaded.model.config), loaded.tokenizer is not None
    loaded.beside.refuse_a_part()
    loaded.beside = loaded.beside.for_task(loaded.task, stated, tokenised=tokenised)
    if loaded.beside.pools_first:
        config = PruneConfig.create(config, embedding_pooling="cls")
    if loaded.beside.readers and not trained:
        config = _without_hidden(config, loaded)
    teacher: Teacher = None
    if taught_by is not None:
        teacher = "self" if taught_by == "self" else load_model(taught_by, loaded.task)
    if folder is not None and not options.dry_run:
        folder.mkdir(parents=True, exist_ok=True)
    return loaded, {
        "teacher": teacher,
        "unlabelled_dataset": loaded.datasets.get("unlabelled_file"),
        "eval_dataset": loaded.datasets.get("validation_file"),
        "data_collator": loaded.collator,
        "config": config,
        "output_dir": folder,
        "resume": options.resume,
    }


def _without_hidden(config: PruneConfig, loaded: Loaded) -> PruneConfig:
    """Leave hidden dimensions whole, because modules behind the encoder have weights for all of them.

    :raises SettingsError: when they are asked for by name.
    """
    from cofiprune.adapter import structure
    from cofiprune.compaction.uniform_config import config_names
    from cofiprune.training.resolved import unit_kinds

    found = structure(loaded.model)
    kinds = unit_kinds(found)
    tied = config.uniform and config_names(loaded.model, found).head_dim is None  # fewer heads are a smaller width
    left = tuple(unit for unit in kinds if unit != "hidden" and not (unit == "head" and tied))
    readers = f"{' and '.join(loaded.beside.readers)} behind the encoder reads all of its hidden dimensions"
    if "hidden" in (*(config.units or ()), *(config.one_shot_units or ())):
        raise SettingsError(f"{readers}: leave hidden out of the units, --units {' '.join(left)}")
    if config.units is not None or left == kinds:
        return config
    warnings.warn(f"{readers}, which stay: --units {' '.join(left)}", UserWarning, stacklevel=4)
    return PruneConfig.create(config, units=left)


def _save(result: PruneResult, loaded: Loaded, options: argparse.Namespace) -> None:
    """Write the model with all that belongs to it, and print the result and what comes next."""
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    folder = result.save(
        options.output_dir,
        tokenizer=loaded.tokenizer,
        overwrite=True,  # it was looked at before the run
        keep_checkpoints=options.keep_checkpoints,
        command=["cofiprune", options.command, *options.words],
    )
    loaded.beside.copy_to(folder, load_config(str(folder)))
    if options.json:
        print(json.dumps({**result.to_dict(), "folder": str(folder), "files": sizes_of_files(folder)}))
        return
    files = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes_of_files(folder).items())
    name = shlex.quote(str(folder))
    file = options.validation_file or options.train_file
    on_data = f"evaluate {name} --validation-file {shlex.quote(file)}" if file else f"inspect {name}"
    print(f"{result!r}\n\nsaved in {folder}: {files}; report.html and README.md tell of it")
    print(f"next: cofiprune {on_data}\n      cofiprune benchmark {name} --baseline {shlex.quote(model_name(options))}")


def sizes_of_files(folder: Path) -> dict[str, int]:
    """Return the bytes of the files with weights in a folder."""
    return {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}


def _save_sweep(result: SweepResult, loaded: Loaded, options: argparse.Namespace) -> None:
    """Write what else stood beside the model next to each of them, which are saved already, and print the table."""
    from accelerate import PartialState

    from cofiprune.training.checkpoint import remove_checkpoints

    if not PartialState().is_main_process:
        return
    folder = Path(options.output_dir)
    for point in result:
        if point.folder is not None:
            loaded.beside.copy_to(point.folder, load_config(str(point.folder)))
            if not options.keep_checkpoints:
                remove_checkpoints(point.folder / "run")
    result.plot(folder / "curve.svg")
    if options.json:
        named = ("target", "sparsity", "parameters", "metrics", "latency_ms", "seconds")
        points = [{**{name: getattr(point, name) for name in named}, "folder": str(point.folder)} for point in result]
        print(json.dumps({"points": points, "setting": result.setting}))
    else:
        print(f"{result}\n\nsaved in {folder}")

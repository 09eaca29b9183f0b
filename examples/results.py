"""What a run of an example leaves: result.json, and a table made of it."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from cofiprune.errors import CheckpointError

RESULT = "result.json"
Result = dict[str, Any]
console = Console()


def say(what: str | Table) -> None:
    """Print a line or a table, in the main process only."""
    if PartialState().is_main_process:
        console.print(what, highlight=False, markup=False, soft_wrap=isinstance(what, str))


def finished(folder: Path, identity: Mapping[str, Any] | None = None) -> Result | None:
    """The result of a run that is finished, or None.

    :param identity: of the run that is asked for.
    :raises CheckpointError: when the result is that of another run, or damaged.
    """
    file = folder / RESULT
    if not file.is_file():
        return None
    try:
        result: Result = json.loads(file.read_text(encoding="utf-8"))
        found = result["identity"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {error!r}") from error
    for name, asked in json.loads(json.dumps(dict(identity or {}))).items():
        if found.get(name) != asked:
            raise CheckpointError(
                f"{folder} holds the result of another run: its {name} is {found.get(name)!r}, asked for {asked!r}; "
                "choose another --output-dir, or delete the folder"
            )
    return {**result, "folder": str(folder)}  # it may have been moved


def resumable(folder: Path) -> bool:
    """Whether a folder holds a complete checkpoint."""
    return any(folder.glob("checkpoint-*/meta.json"))


def finish(folder: Path, result: Result) -> None:
    """Write the result; the checkpoints, which it replaces, go."""
    partial = folder / f"{RESULT}.partial"
    partial.write_text(json.dumps(result, indent=1), encoding="utf-8")
    os.replace(partial, folder / RESULT)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def result_table(result: Result) -> Table:
    """Quality, size, speed and cost of a run, beside those of its teacher or of the dense model."""
    dense: Result = result["dense"]
    before = "teacher" if dense["metrics"] else "dense"
    table = Table("", before, "result", "", title=f"{result['identity']['task']}: {result['folder']}")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, value in result["metrics"].items():
        old = dense["metrics"].get(name)
        change = "" if old is None else f"{value - old:+.4f}"
        table.add_row(name, "" if old is None else f"{old:.4f}", f"{value:.4f}", change)
    table.add_section()
    for label, name in (
        ("parameters in the layers", "layer_parameters"),
        ("parameters without embeddings", "parameters_without_embeddings"),
    ):
        old, new = dense[name], result[name]
        table.add_row(label, f"{old:,}", f"{new:,}", f"{old / new:.1f}x fewer" if new and new != old else "")
    table.add_row("sparsity of the layers", "", f"{result['sparsity']:.4f}", "")
    for row in result["speed"]:
        times = [f"{row[name]:.2f} ms" for name in ("dense_ms", "ms")]
        table.add_row(f"batch of {row['batch_size']} x {row['seq_len']}", *times, f"{row['speedup']:.2f}x faster")
    spent = (dense["seconds"], result["seconds"])
    table.add_row("training", *("" if seconds is None else f"{seconds / 60:.1f} min" for seconds in spent), "")
    if result["best_step"] is not None:
        table.add_row("weights", "", f"of step {result['best_step']}", "chosen on these rows")
    return table

"""The original's search: pruning with several distillation weights, then fine-tuning with several learning rates."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import Dense, run_once
from results import Result, say
from rich.table import Table

import cofiprune
from cofiprune.errors import SettingsError

if TYPE_CHECKING:
    from common import Task


def run_grid(options: argparse.Namespace, task: "Task", config: cofiprune.PruneConfig, dense: Dense) -> dict[str, Any]:
    """Run every cell that is not finished, print them all, the best one first, and return the best one's result.

    :raises SettingsError: when there is nothing to prune.
    """
    if options.target_sparsity is None or options.pretrained_pruned_model is not None:
        raise SettingsError("--grid prunes: it takes a --target-sparsity, and no --pretrained-pruned-model")
    output: Path = options.output_dir
    cells: list[Result] = []
    for layers, logits in options.grid_alphas:
        weights = {"distill_layers_weight": layers, "distill_logits_weight": logits}
        folder = output / f"layers{layers:g}-logits{logits:g}"
        pruning = cofiprune.PruneConfig.create(config, **weights, finetune_epochs=0)
        run_once(options, task, pruning, folder / "pruned", dense)
        for rate in options.grid_learning_rates:
            tuning = cofiprune.PruneConfig.create(config, **weights, finetune_learning_rate=rate)
            cells.append(run_once(options, task, tuning, folder / f"lr{rate:g}", dense, str(folder / "pruned")))
    cells.sort(key=lambda cell: cell["metrics"][task.headline], reverse=True)
    say(grid_table(cells, task, output))
    return cells[0]


def grid_table(cells: list[Result], task: "Task", output: Path) -> Table:
    """All cells, the best one first."""
    table = Table(title=f"{task.name}, sorted by {task.headline}")
    table.add_column(f"folder in {output}", overflow="fold")
    for name in (*cells[0]["metrics"], "sparsity", "minutes"):
        table.add_column(name, justify="right")
    for cell in cells:
        table.add_row(
            Path(cell["folder"]).relative_to(output).as_posix(),
            *(f"{value:.4f}" for value in cell["metrics"].values()),
            f"{cell['sparsity']:.4f}",
            f"{cell['seconds'] / 60:.1f}",
        )
    return table

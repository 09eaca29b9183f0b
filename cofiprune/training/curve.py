"""The curve of a sweep: what is kept of the metric, over size and over time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cofiprune.errors import SettingsError, suggest

if TYPE_CHECKING:
    from cofiprune.training.sweep import SweepResult


def draw(result: SweepResult, path: Path, metric: str | None) -> None:
    """Write the picture; its kind goes by the file's ending.

    :raises SettingsError: when matplotlib is not installed, or the metric was not measured.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SettingsError("a plot needs matplotlib: pip install matplotlib") from error
    name = _metric(result, metric)
    values = [point.parameters if name is None else point.metrics[name] for point in result]
    timed = all(point.latency_ms is not None for point in result)
    figure = Figure(figsize=(9 if timed else 4.8, 3.6), layout="constrained")
    axes = figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
    label = "parameters" if name is None else name.removeprefix("eval_")
    panels = [("sparsity of the layers", [point.sparsity for point in result])]
    if timed:
        panels.append(("ms per batch", [point.latency_ms or 0.0 for point in result]))
    for axis, (title, places) in zip(axes, panels, strict=True):
        axis.plot(places, values, marker="o", color="#2a6f97")
        for place, value, point in zip(places, values, result, strict=True):
            axis.annotate(f"{point.target:g}", (place, value), xytext=(4, 5), textcoords="offset points", fontsize=8)
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
        axis.margins(0.12)
    axes[0].set_ylabel(label)
    if timed:
        figure.supxlabel(result.setting, fontsize=8, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _metric(result: SweepResult, asked: str | None) -> str | None:
    measured = [name for name in result[0].metrics if all(name in point.metrics for point in result)]
    if asked is not None:
        found = next((name for name in measured if asked in (name, name.removeprefix("eval_"))), None)
        if found is None:
            names = [name.removeprefix("eval_") for name in measured]
            raise SettingsError(
                f"no metric {asked!r} was measured.{suggest(asked, names)} There are: {', '.join(names)}"
            )
        return found
    skipped = ("loss", "runtime", "per_second", "examples")
    return next((name for name in measured if not any(part in name for part in skipped)), None)

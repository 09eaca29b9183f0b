"""Several sparsities from one run: each starts from what the one before has left.

The points are a family: a smaller one keeps nothing that a larger one has lost. With an `output_dir` each is on disk
as soon as it is done, and a run that was cut off goes on with the next.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from cofiprune.accounting import amount
from cofiprune.compaction.slicing import write_back
from cofiprune.data.prepare import prepare
from cofiprune.drawing import Picture, is_score, trade_off
from cofiprune.errors import CheckpointError, SettingsError, explained
from cofiprune.files import check_sums, checksum, read_sealed, write_sealed
from cofiprune.latency.measuring import conditions_of, times_of
from cofiprune.latency.table import Conditions
from cofiprune.masking import attach_to
from cofiprune.measure.figures import Figures
from cofiprune.measure.report import Report, rich_table
from cofiprune.plan import Plan
from cofiprune.selection.target import Target
from cofiprune.training.arguments import counted_length, take_masks_off
from cofiprune.training.checkpoint import Resume, has_checkpoints
from cofiprune.training.environment import check_output_dir, metric_name
from cofiprune.training.identity import check_same, digest_of_rows, identity
from cofiprune.training.result import PruneResult
from cofiprune.training.run import Run
from cofiprune.whole import Whole

if TYPE_CHECKING:
    from rich.console import RenderableType
    from transformers import PreTrainedModel

_POINT, _PLAN = "point.json", "plan.json"


@dataclass(frozen=True)
class SweepPoint:
    """One of the models of a sweep."""

    target: float
    sparsity: float
    """Removed share of the parameters of the encoder's layers, of the model that the sweep began with."""
    parameters: int
    """Of the model, embeddings included."""
    metrics: dict[str, float]
    latency_ms: float
    """Median of a forward pass at `target_batch_size` and `target_seq_len`."""
    seconds: float
    plan: Plan = field(repr=False)
    """The kept units, in terms of the model that the sweep began with."""
    model: PreTrainedModel = field(repr=False)
    """The compacted model."""
    folder: Path | None = None
    dense: Figures | None = field(default=None, repr=False)
    """What the model that this one was made of scored, weighed and took; None in files of earlier versions."""


@dataclass(frozen=True, repr=False)
class SweepResult(Report, Sequence[SweepPoint]):
    """The models of a sweep, from the largest to the smallest; prints as a table, and renders in notebooks."""

    points: tuple[SweepPoint, ...]
    setting: str = ""
    """Conditions under which latencies were measured."""

    @property
    def dense(self) -> Figures | None:
        """What the model that the sweep began with scored, weighed and took."""
        return self.points[0].dense

    def __len__(self) -> int:
        return len(self.points)

    @overload
    def __getitem__(self, index: int) -> SweepPoint: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[SweepPoint]: ...
    def __getitem__(self, index: int | slice) -> SweepPoint | Sequence[SweepPoint]:
        return self.points[index]

    def __iter__(self) -> Iterator[SweepPoint]:
        return iter(self.points)

    def around(self, whole: Whole) -> SweepResult:
        """Return the same with the models in copies of an object of sentence-transformers."""
        points = (
            replace(point, model=whole.around(point.model, hidden=point.plan.keep.get("hidden", ())))
            for point in self.points
        )
        return replace(self, points=tuple(points))

    def __rich__(self) -> RenderableType:
        from rich.console import Group

        names = list(dict.fromkeys(name for point in self.points for name in point.metrics))
        header = ["target", "sparsity", "parameters", "latency", *(name.removeprefix("eval_") for name in names), "min"]
        rows = [
            [*_row(f"{each.target:g}", each.sparsity, each.parameters, each.latency_ms, each.metrics, names), minutes]
            for each, minutes in ((each, f"{each.seconds / 60:.1f}") for each in self.points)
        ]
        dense = self.dense
        if dense is not None:
            rows.insert(0, [*_row("dense", 0, dense.parameters, dense.latency_ms, dense.metrics, names), ""])
        return Group(*([self.setting] if self.setting else []), rich_table(header, rows))

    def plot(self, path: str | Path | None = None, *, metric: str | None = None) -> Picture:
        """Draw the metric, or the size where nothing was evaluated, over sparsity and over latency.

        :param path: of a file to write as well: .svg, or another kind of picture by matplotlib.
        :param metric: by default the first that is no loss.
        :raises SettingsError: when matplotlib is needed and not installed, or the metric was not measured.
        """
        name = self._drawn(metric)
        title = "parameters" if name is None else name.removeprefix("eval_")
        values = [float(point.parameters if name is None else point.metrics[name]) for point in self]
        axes = {"sparsity": [point.sparsity for point in self], "ms": [point.latency_ms for point in self]}
        dense = self.dense
        level = None if dense is None else dense.parameters if name is None else dense.metrics.get(name)
        picture = trade_off(title, axes, values, level)
        if path is not None and Path(path).suffix.lower() == ".svg":
            picture.save(path)
        elif path is not None:
            self._draw(Path(path), title, axes, values)
        return picture

    def _draw(self, path: Path, title: str, axes: Mapping[str, Sequence[float]], values: Sequence[float]) -> None:
        with explained(
            SettingsError, f"{path.name} needs matplotlib, pip install matplotlib; .svg does not", ImportError
        ):
            from matplotlib.figure import Figure
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        charts = figure.subplots(1, 2, sharey=True)
        charts[0].set_ylabel(title)
        for chart, (unit, places) in zip(charts, axes.items(), strict=True):
            chart.plot(places, values, marker="o", color="#2a6f97")
            for point, place, value in zip(self, places, values, strict=True):
                chart.annotate(
                    f"{point.target:g}", (place, value), xytext=(4, 5), textcoords="offset points", fontsize=8
                )
            chart.grid(alpha=0.3)
            chart.margins(0.12)
            chart.set_xlabel("sparsity of the layers" if unit == "sparsity" else "ms per batch")
        figure.supxlabel(self.setting, fontsize=8, color="#555555")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)

    def _drawn(self, asked: str | None) -> str | None:
        """The metric to draw; None where nothing but losses and times was measured."""
        measured = [name for name in self[0].metrics if all(name in point.metrics for point in self)]
        if asked is not None:
            return metric_name(asked, measured, "metric")
        return next(filter(is_score, measured), None)


def _row(
    name: str, sparsity: float, parameters: int, latency: float | None, metrics: Mapping[str, float], names: list[str]
) -> list[str]:
    """Cells of a table's row.

    :param names: of the metrics that the table has columns for.
    """
    time = "" if latency is None else f"{latency:.2f} ms"
    scores = (f"{metrics[name]:.4f}" if name in metrics else "" for name in names)
    return [name, f"{sparsity:.4f}", amount(parameters), time, *scores]


def sweep(
    run: Run, targets: Sequence[Target], prune_one: Callable[[Run], PruneResult], tokenizer: Any = None
) -> SweepResult:
    """Prune to each target in turn; the model ends with the last one's weights and masks.

    :param targets: of the run's model as it is, ascending in what goes.
    :param prune_one: carries out a run of one target.
    :param tokenizer: written beside each model.
    :raises CheckpointError: when the folder holds another sweep.
    """
    config, model, structure = run.config, run.model, run.structure
    folder = check_output_dir(run.output_dir, resume=run.resume)
    take_masks_off(model)
    if folder is not None:
        _check_folder(folder, _identity(run, targets), resume=run.resume)
    if config.time_budget is not None:
        run = replace(run, config=config.model_copy(update={"time_budget": config.time_budget / len(targets)}))
    batch_size, seq_len = config.target_batch_size, counted_length(model, config)
    conditions = conditions_of(
        model, structure, batch_size=batch_size, seq_len=seq_len, cut_hidden=False, engine=config.engine
    )
    points: list[SweepPoint] = []
    current, plan = model, Plan.from_values(structure, {})
    for target in targets:
        place = None if folder is None else folder / f"sparsity-{target.requested:g}"
        point = None if place is None or not run.resume else _read(place, target, type(model))
        if point is None:
            point = _next(run, current, plan, target, place, conditions, prune_one)
            if place is not None:
                _write(place, point, tokenizer)
        points.append(point)
        current, plan = point.model, point.plan
    write_back(model, structure, current, plan)
    attach_to(model, structure).set_plan(plan)
    return SweepResult(tuple(points), f"batch {batch_size}, length {seq_len}, {conditions.device}")


def _check_folder(folder: Path, identity: dict[str, Any], *, resume: Resume) -> None:
    """Make sure that a folder is this sweep's, and write down whose it is.

    :raises CheckpointError: when it holds another one, or this one and it was not asked to go on.
    """
    file = folder / "sweep.json"
    if not file.exists():
        write_sealed(file, identity, indent=1)
        return
    if not resume:
        raise CheckpointError(f"{folder} holds an earlier sweep: pass resume=True to go on, or choose another folder")
    found = read_sealed(file, CheckpointError, f"{file} is damaged; start afresh in another folder")
    check_same(json.loads(json.dumps(identity)), found, f"{folder} holds another sweep", ", or choose another folder")


def _identity(run: Run, targets: Sequence[Target]) -> dict[str, Any]:
    """What a resumed sweep must have in common with the one that was begun."""
    rows = None
    if run.train_dataset is not None:
        size, collator = run.config.batch_size, run.collator
        rows = digest_of_rows(
            prepare(run.train_dataset, run.model, batch_size=size, collator=collator, need_labels=False)
        )
    return {
        "targets": [target.requested for target in targets],
        "rows": rows,
        **identity(run.model, "self" if run.teaches_itself else run.teacher, run.config),
    }


def _next(
    run: Run,
    current: PreTrainedModel,
    plan: Plan,
    target: Target,
    folder: Path | None,
    conditions: Conditions,
    prune_one: Callable[[Run], PruneResult],
) -> SweepPoint:
    """Go on from the model of the point before, which stays as it is."""
    runs = None if folder is None else folder / "run"
    goes_on = run.resume and runs is not None and has_checkpoints(runs)
    structure = run.structure.cut(plan.kept)
    result = prune_one(
        replace(run, model=copy.deepcopy(current), structure=structure, target=target, output_dir=runs, resume=goes_on)
    )
    small, kept_of_all = result.compact(), plan.then(result.plan.hard)
    latency = float(np.median(times_of([small], conditions))) / 1e6
    return SweepPoint(
        target=target.requested,
        sparsity=1 - target.kept_share(run.structure.cut(kept_of_all.kept)),
        parameters=sum(parameter.numel() for parameter in small.parameters()),
        metrics=dict(result.metrics),
        latency_ms=latency,
        seconds=result.seconds,
        plan=kept_of_all,
        model=small,
        folder=folder,
        dense=result.dense,
    )


def _write(folder: Path, point: SweepPoint, tokenizer: Any) -> None:
    """Write a point with all that belongs to it; the file that says that it is complete comes last."""
    point.model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    point.plan.save(folder / _PLAN)
    kept = ("target", "sparsity", "parameters", "metrics", "latency_ms", "seconds")
    entries = {name: getattr(point, name) for name in kept}
    entries["dense"] = None if point.dense is None else asdict(point.dense)
    sums = {file.name: checksum(file) for file in sorted(folder.iterdir()) if file.is_file()}
    write_sealed(folder / _POINT, {**entries, "checksums": sums}, indent=1)


def _read(folder: Path, target: Target, cls: type[PreTrainedModel]) -> SweepPoint | None:
    """Return a point that is on disk; None for one that is not, or not complete."""
    file = folder / _POINT
    if not file.exists():
        return None
    problem = f"{folder} is damaged; delete it to have that model made again"
    entries = read_sealed(file, CheckpointError, problem)
    check_sums(folder, entries.pop("checksums", {}), CheckpointError, problem)
    if (dense := entries.pop("dense", None)) is not None:
        entries["dense"] = Figures(**dense)
    return SweepPoint(**entries, plan=Plan.load(folder / _PLAN), model=cls.from_pretrained(folder), folder=folder)

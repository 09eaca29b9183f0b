"""Several sparsities from one run: each starts from what the one before has left.

The points are a family: a smaller one keeps nothing that a larger one has lost. With an `output_dir` each is on disk
as soon as it is done, and a run that was cut off goes on with the next.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from cofiprune.accounting import amount
from cofiprune.compaction.slicing import write_back
from cofiprune.data.prepare import prepare
from cofiprune.errors import CheckpointError, SettingsError
from cofiprune.files import check_sums, checksum, read_sealed, write_sealed
from cofiprune.latency.measuring import conditions_of, times_of
from cofiprune.latency.table import Conditions
from cofiprune.masking import attach_to
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


@dataclass(frozen=True, repr=False)
class SweepResult(Report, Sequence[SweepPoint]):
    """The models of a sweep, from the largest to the smallest; prints as a table, and renders in notebooks."""

    points: tuple[SweepPoint, ...]
    setting: str = ""
    """Conditions under which latencies were measured."""

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
            [
                f"{point.target:g}",
                f"{point.sparsity:.4f}",
                amount(point.parameters),
                f"{point.latency_ms:.2f} ms",
                *(f"{point.metrics[name]:.4f}" if name in point.metrics else "" for name in names),
                f"{point.seconds / 60:.1f}",
            ]
            for point in self.points
        ]
        return Group(*([self.setting] if self.setting else []), rich_table(header, rows))

    def plot(self, path: str | Path, *, metric: str | None = None) -> None:
        """Draw the metric, or the size where nothing was evaluated, over sparsity and over latency.

        :param path: of a file whose ending says the kind of picture.
        :param metric: by default the first that is no loss.
        :raises SettingsError: when matplotlib is not installed, or the metric was not measured.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise SettingsError("a plot needs matplotlib: pip install matplotlib") from error
        name = self._drawn(metric)
        values = [point.parameters if name is None else point.metrics[name] for point in self]
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _draw(left, [point.sparsity for point in self], values, [point.target for point in self])
        _draw(right, [point.latency_ms for point in self], values, [point.target for point in self])
        left.set_xlabel("sparsity of the layers")
        left.set_ylabel("parameters" if name is None else name.removeprefix("eval_"))
        right.set_xlabel("ms per batch")
        figure.supxlabel(self.setting, fontsize=8, color="#555555")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)

    def _drawn(self, asked: str | None) -> str | None:
        """The metric to draw; None where nothing but losses and times was measured."""
        measured = [name for name in self[0].metrics if all(name in point.metrics for point in self)]
        if asked is not None:
            return metric_name(asked, measured, "metric")
        skipped = ("loss", "runtime", "per_second", "examples")
        return next((name for name in measured if not any(part in name for part in skipped)), None)


def _draw(axis: Any, places: Sequence[float], values: Sequence[float], targets: Sequence[float]) -> None:
    axis.plot(places, values, marker="o", color="#2a6f97")
    for place, value, target in zip(places, values, targets, strict=True):
        axis.annotate(f"{target:g}", (place, value), xytext=(4, 5), textcoords="offset points", fontsize=8)
    axis.grid(alpha=0.3)
    axis.margins(0.12)


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
    )


def _write(folder: Path, point: SweepPoint, tokenizer: Any) -> None:
    """Write a point with all that belongs to it; the file that says that it is complete comes last."""
    point.model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    point.plan.save(folder / _PLAN)
    kept = ("target", "sparsity", "parameters", "metrics", "latency_ms", "seconds")
    entries = {name: getattr(point, name) for name in kept}
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
    return SweepPoint(**entries, plan=Plan.load(folder / _PLAN), model=cls.from_pretrained(folder), folder=folder)

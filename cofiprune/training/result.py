"""Results of `prune` and `finetune`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cofiprune.compaction import compact
from cofiprune.compaction.slicing import compacted
from cofiprune.drawing import Picture, counted, curves, structure_map
from cofiprune.errors import PlanError
from cofiprune.files import check_unfinished, write, write_json
from cofiprune.masking import masks_of
from cofiprune.measure.figures import Figures, Subject, compared, figures_of
from cofiprune.measure.report import Report, entries_table, rich_table
from cofiprune.plan import Plan
from cofiprune.record import recorded_sizes
from cofiprune.selection.target import Target
from cofiprune.structure import Structure
from cofiprune.training.checkpoint import remove_checkpoints
from cofiprune.training.resolved import ResolvedSettings
from cofiprune.training.written import Story, base_of, card, report
from cofiprune.whole import Whole, inside

if TYPE_CHECKING:
    from rich.console import RenderableType
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TargetReport:
    """The target of a run, and what came of it."""

    name: str
    """The argument that asked for it: `target_sparsity`, `target_macs` and so on."""
    asked: float
    reached: float
    """The same figure of the compacted model."""
    text: str
    """Both in words."""

    def __str__(self) -> str:
        return self.text


def reached(target: Target, model: PreTrainedModel, structure: Structure, plan: Plan) -> TargetReport:
    """Report the cost that a plan leaves; where it is an estimate, it is measured.

    :param model: that the plan is for.
    """
    if target.measure is None:
        left: float = target.cost(structure).exact(plan.kept)
    else:
        left = target.measure(compacted(model, structure, plan))
    value = target.value_of(left)
    if target.measure is not None and abs(left / target.budget - 1) > target.slack:
        warnings.warn(
            f"{target} was asked for; measured again, the compacted model has {target.text(left)}. Times vary "
            "on a busy machine, and no sizes may lie nearer",
            UserWarning,
            stacklevel=2,
        )
    return TargetReport(target.name, target.requested, value, f"{target}, reached {target.text(left)}")


def figures_around(
    model: PreTrainedModel,
    structure: Structure,
    plan: Plan,
    settings: ResolvedSettings,
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> list[Figures]:
    """Return what a model was before a plan was made of it, and what the plan leaves.

    :param before: what it scored; `after` what is left scores.
    """
    dense = Subject(compacted(model, structure, Plan.from_values(structure, {})), structure, before)
    small = Subject(compacted(model, structure, plan), structure.cut(plan.kept), after)
    return figures_of(dense, small, batch_size=settings.target_batch_size, seq_len=settings.target_seq_len)


def metrics_of(history: Sequence[Mapping[str, Any]], step: int | None = None) -> dict[str, float]:
    """The metrics of the last evaluation in a history, or of the one after a step; empty where there is none."""
    for entry in reversed(history):
        found = {name: value for name, value in entry.items() if name.startswith("eval_")}
        if found and step in (None, entry["step"]):
            return found
    return {}


@dataclass(repr=False)
class PruneResult(Report):
    """A finished run."""

    model: Any
    """The model, or the object of sentence-transformers, that was passed in, with its final masks attached."""
    plan: Plan
    """The kept units."""
    sparsity: float
    """Removed share of the parameters of the encoder's layers."""
    model_sparsity: float
    """Removed share of every parameter of the model."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last evaluation; empty without an evaluation set."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry per logged step and evaluation."""
    seconds: float = 0.0
    """Training time, over all resumed parts."""
    best_step: int | None = None
    """The step whose weights were kept when `metric_for_best_model` chose them."""
    method: str = ""
    """A value of `PruneConfig.method`, never "auto"; "no data" for `prune` without any, "" for
    `finetune`."""
    reason: str = ""
    """With `method="auto"`: the choice and its reason, in one sentence."""

    target: TargetReport | None = None
    """The target and its outcome; None for `finetune`."""
    dense: Figures | None = None
    """What the model scored, weighed and took before; in `finetune` too. Inside a Trainer, and of a run that an earlier
    version began, it has no scores."""
    pruned: Figures | None = None
    """The same of the smaller model, and in `finetune` of the trained one."""
    tokenizer: Any = None
    """The one that `prune` was given."""
    datasets: tuple[str, ...] = ()
    """Names of the training data on the hub, where they are known."""
    settings: ResolvedSettings = field(kw_only=True)
    """The settings that were used, with a value for every setting that was left open."""

    @property
    def uniform(self) -> bool:
        """Whether every layer has the same shape, so that the smaller model loads without cofiprune."""
        return self.target is not None and self.settings.uniform

    @property
    def is_smaller(self) -> bool:
        """Whether units were removed, in this run or by masks that it left as they were."""
        return self.target is not None or masks_of(inside(self.model)) is not None

    def of(self, tokenizer: Any, train_dataset: Any) -> PruneResult:
        """Note what the run was given, for what is written of it."""
        info = getattr(train_dataset, "info", None)
        name = getattr(info, "dataset_name", None)
        self.tokenizer, self.datasets = tokenizer, () if name is None else (str(name),)
        return self

    def compact(self, *, fuse: bool = False) -> Any:
        """Return the smaller model that the plan leaves, with `uniform=True` where the run had it.

        :param fuse: as in `cofiprune.compact`.
        :raises PlanError: when the model has other masks by now, of a later run for example: its weights have been
            trained for those.
        """
        masks = masks_of(inside(self.model))
        if masks is not None and Plan.from_masks(masks) != self.plan:
            raise PlanError(
                "the masks on the model are no longer those of this result: it was pruned again, or they were changed. "
                "cofiprune.compact(model) gives what they leave; prune a copy of the model to keep both"
            )
        return compact(self.model, self.plan, uniform=self.uniform, fuse=fuse)

    def save(
        self,
        folder: str | Path,
        *,
        tokenizer: Any = None,
        overwrite: bool = False,
        keep_checkpoints: bool = False,
        command: Sequence[str] = (),
    ) -> Path:
        """Write the smaller model with all that belongs to it: tokenizer, plan, result, report and card.

        The files are `model.safetensors`, `config.json` and those of the tokenizer, `plan.json`, `result.json`,
        `report.html` and `README.md`, the model card. Checkpoints in the same folder are removed when all is written.

        :param tokenizer: by default the one that `prune` was given.
        :param overwrite: write over a model that is there already.
        :param keep_checkpoints: leave them.
        :param command: the command line that made the result, for report and card.
        :return: the folder.
        :raises SettingsError: when it holds a model already.
        """
        place = Path(folder)
        if not overwrite:
            check_unfinished(place)
        place.mkdir(parents=True, exist_ok=True)
        model = self.compact() if self.is_smaller else self.model
        model.save_pretrained(place)
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        if tokenizer is not None:
            tokenizer.save_pretrained(place)
        if self.is_smaller:
            self.plan.save(place / "plan.json")
        write_json(place / "result.json", self.to_dict(), indent=1)
        story = self._story(model, command, has_code=any(place.glob("modeling_*.py")))
        for name, text in (("report.html", report(story, place.name)), ("README.md", card(story, place.name))):
            write(place / name, partial(Path.write_text, data=text, encoding="utf-8"))
        if not keep_checkpoints:
            remove_checkpoints(place)
        return place

    def to_dict(self) -> dict[str, Any]:
        """Return all but the model as plain values."""
        named = ("sparsity", "model_sparsity", "metrics", "best_step", "seconds", "method", "reason", "history")
        return {
            **{name: getattr(self, name) for name in named},
            "target": None if self.target is None else asdict(self.target),
            "dense": None if self.dense is None else asdict(self.dense),
            "pruned": None if self.pruned is None else asdict(self.pruned),
            "kept": self.plan.kept,
            "settings": self.settings.model_dump(mode="json"),
        }

    def plot(self, path: str | Path | None = None) -> Picture:
        """Draw loss, metric and sparsity over the steps; where there were none, the structure.

        :param path: of an .svg file to write as well.
        """
        before = {} if self.dense is None else self.dense.metrics
        sparsity = self.sparsity if self.is_smaller else None
        picture = curves(self.history, before, sparsity) or structure_map(
            self.plan.sizes, self.plan.kept, self.plan.keep
        )
        if path is not None:
            picture.save(path)
        return picture

    def _story(self, model: Any, command: Sequence[str], *, has_code: bool) -> Story:
        whole = Whole.of(model)
        base, is_folder = base_of(str(getattr(whole.model.config, "_name_or_path", "")))
        told = [f"{self.sparsity:.1%} of the layers' parameters removed"] if self.is_smaller else []
        told += [str(self.target)] if self.target is not None and self.target.name != "target_sparsity" else []
        told += [f"method {self.method}"] if self.method else []
        told += [] if self.is_smaller else [f"trained for {self.settings.finetune_epochs:g} epochs"]
        told += [f"{self.seconds / 60:.1f} minutes of training"] if self.seconds else []
        plan = self.plan if self.is_smaller else None
        return Story(
            type(whole.model).__name__, base, is_folder, plan, self.sparsity, self.method,
            "; ".join(told), self.dense, self.pruned, self.history, self.settings.model_dump(), self.datasets,
            needs_cofiprune=recorded_sizes(whole.model.config) is not None, has_code=has_code, command=command,
            kind=whole.kind,
        )  # fmt: skip

    def _figures(self) -> list[tuple[str, ...]]:
        if self.dense is None or self.pruned is None:
            return [(name.removeprefix("eval_"), "", f"{value:.4f}", "") for name, value in self.metrics.items()]
        return compared(self.dense, self.pruned)

    def __rich__(self) -> RenderableType:
        from rich.console import Group

        rows = [("model", f"{type(self.model).__name__} ({self.plan.family})")]
        if self.target is not None and self.target.name != "target_sparsity":
            rows.append(("target", str(self.target)))
        if self.is_smaller or self.sparsity:
            rows.append(("sparsity", f"{self.sparsity:.4f} of the layers, {self.model_sparsity:.4f} of the model"))
        if self.is_smaller:
            rows.append(("kept", counted(self.plan.sizes, self.plan.kept)))
        if self.method:
            rows.append(("method", self.reason or self.method))
        if self.seconds:
            rows.append(("time", f"{self.seconds / 60:.1f} min, {len(self.history)} history entries"))
        if self.best_step is not None:
            rows.append(("weights", f"of step {self.best_step}, chosen by the evaluation set"))
        header = ["", "dense", "pruned", ""] if self.is_smaller else ["", "before", "after", ""]
        figures = self._figures()
        table = [rich_table(header, figures)] if figures else []
        return Group("PruneResult", entries_table(rows), *table, *([self.dense.setting] if self.dense else []))

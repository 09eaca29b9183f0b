"""Results of `prune` and `finetune`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cofiprune.compaction import compact
from cofiprune.compaction.slicing import compacted
from cofiprune.errors import PlanError
from cofiprune.masking import masks_of
from cofiprune.measure.report import Report, entries_table
from cofiprune.plan import Plan
from cofiprune.selection.target import Target
from cofiprune.structure import Structure
from cofiprune.training.resolved import ResolvedSettings
from cofiprune.whole import inside

if TYPE_CHECKING:
    from rich.console import RenderableType
    from transformers import PreTrainedModel


_PARTS = {
    "blocks": (".attention", ".ffn"),
    "heads": (".heads",),
    "intermediate": (".intermediate",),
    "hidden": ("hidden",),
}
"""What a result counts, by the endings of the groups' names."""


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
    settings: ResolvedSettings = field(kw_only=True)
    """The settings that were used, with a value for every setting that was left open."""

    @property
    def uniform(self) -> bool:
        """Whether every layer has the same shape, so that the smaller model loads without cofiprune."""
        return self.target is not None and self.settings.uniform

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

    def __rich__(self) -> RenderableType:
        from rich.console import Group

        kept, sizes = self.plan.kept, self.plan.sizes
        rows = [("model", f"{type(self.model).__name__} ({self.plan.family})")]
        if self.target is not None and self.target.name != "target_sparsity":
            rows.append(("target", str(self.target)))
        rows.append(("sparsity", f"{self.sparsity:.4f} of the layers, {self.model_sparsity:.4f} of the model"))
        for part, endings in _PARTS.items():
            names = [name for name in kept if name.endswith(endings)]
            if names:
                left, total = (sum(units[name] for name in names) for units in (kept, sizes))
                rows.append((part, f"{left} of {total} kept"))
        rows += [(name.removeprefix("eval_"), f"{value:.4f}") for name, value in self.metrics.items()]
        if self.method:
            rows.append(("method", self.reason or self.method))
        if self.seconds:
            rows.append(("time", f"{self.seconds / 60:.1f} min, {len(self.history)} history entries"))
        if self.best_step is not None:
            rows.append(("weights", f"of step {self.best_step}, chosen by the evaluation set"))
        return Group("PruneResult", entries_table(rows))

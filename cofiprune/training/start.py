"""The beginning of a run: what method="auto" makes of a budget, and pruning in one shot.

One shot prunes all of the way to a target, or as far as gates are to start from. It takes a time that is known up to a
factor from one training step; with method="auto", what a budget leaves after it goes into epochs of recovery. Gates
are not picked: in the one comparison made, after one shot they brought nothing that recovery did not, for more time
(docs/benchmarks.md).
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast
from torch import Tensor

from cofiprune.compaction.slicing import compacted
from cofiprune.data.batches import Batch, Batches, model_inputs, to_model
from cofiprune.data.tasks import supported_kwargs
from cofiprune.distillation import predictions
from cofiprune.errors import DataError, SettingsError, TargetError
from cofiprune.hooks import evaluating
from cofiprune.oneshot.layerwise import counted
from cofiprune.oneshot.with_data import FIT_POSITIONS, RoundPruning, calibration, can_start, rounds
from cofiprune.plan import Plan
from cofiprune.selection.reachable import check_target
from cofiprune.selection.target import Target
from cofiprune.structure import Structure
from cofiprune.timing import in_turn
from cofiprune.training.config import PruneConfig
from cofiprune.training.processes import by_first
from cofiprune.training.resolved import ResolvedSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[float], None]
Left = tuple["PreTrainedModel", Plan]
"""A smaller model, and what of the dense one it keeps."""
_ESTIMATE = 0.15
"""Margin, as a share of the budget, that one shot leaves where the result is measured in the end: estimates may be off
by as much, and gates cannot give back what is gone."""
_COST = (2.0, 4.0)
"""Cost of a round of one shot, in training steps of the dense model over the same number of rows: a + b s where a
share s of the layers was left before. Measured on MiniLM-L6 (docs/decisions/0008-one-shot-in-rounds.md)."""
_MARGIN = 1.2
"""On what one shot is expected to take."""
_FLOOR = 0.1
"""Part of a step's time that does not shrink with the model: embeddings, the head, the optimiser."""
WORTHWHILE_EPOCHS = 1.0
"""Fewer epochs than this are not tried: training begins with a loss, and a run that is cut short ends below what one
shot leaves. A choice on the safe side, not a measured bound."""
_STEPS = 3
"""Steps that are timed, after one that pays for what is set up once."""
MOST_EPOCHS = 30.0
"""Most epochs that a time budget is spent on: more epochs are worth asking for by name."""


# The budget of method="auto".


def readable(seconds: float) -> str:
    """Write a time for people.

    >>> readable(48.3), readable(600), readable(7200)
    ('48 s', '10 min', '2 h')
    """
    for size, name in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds:.0f} s"


@dataclass(frozen=True)
class Pace:
    """Measured speed of this machine with this model and these rows."""

    step: float
    """Seconds of a training step of the dense model."""
    teacher: float
    """Seconds that the teacher needs for the rows of a step; 0 without one."""
    steps_per_epoch: int
    one_shot: float
    """Seconds of one shot, on the safe side."""

    def epoch(self, share: float) -> float:
        """Seconds of an epoch on a model of which a share of the layers is left."""
        return self.steps_per_epoch * self.step * (_FLOOR + (1 - _FLOOR) * share)

    def taught(self, epochs: float) -> float:
        """Seconds of the teacher, which runs on each row once."""
        return self.steps_per_epoch * self.teacher * min(epochs, 1.0)

    def epochs_in(self, seconds: float, share: float) -> float:
        """Epochs that fit into a time, the teacher's passes included."""
        epoch = self.epoch(share)
        more = (seconds - self.taught(1.0)) / epoch
        return more if more >= 1 else max(seconds / (epoch + self.taught(1.0)), 0.0)


@dataclass(frozen=True)
class Choice:
    """The rung that was picked."""

    finetune_epochs: float
    """Of recovery, after one shot; 0 for none."""
    reason: str
    """One sentence, for the user."""


def one_shot_steps(shares: Sequence[float]) -> float:
    """Estimate the cost of one shot, in training steps of the dense model over the rows that it uses, on the safe side.

    :param shares: of the layers left after each of its rounds.
    """
    before = (1.0, *shares[:-1])
    return _MARGIN * (1 + sum(_COST[0] + _COST[1] * share for share in before))


def choose(pace: Pace, budget: float, *, share: float) -> Choice:
    """Pick what to do with a time budget.

    :param budget: seconds.
    :param share: share of the layers that one shot leaves, in (0, 1].
    :raises SettingsError: when not even one shot fits in.
    """
    if budget < pace.one_shot:
        raise SettingsError(
            f"time_budget is {readable(budget)}, too short for anything: one shot, the quickest method on data, takes "
            f"about {readable(pace.one_shot)} with this model on this machine. Without data prune(model) takes seconds"
        )
    left = budget - pace.one_shot
    epochs = pace.epochs_in(left, share)
    measured = f"a step takes {pace.step:.2g} s here, one shot about {readable(pace.one_shot)}"
    if epochs < WORTHWHILE_EPOCHS:
        return Choice(
            0.0,
            f"one-shot: {measured}, and the {readable(left)} that are left of {readable(budget)} pay for "
            f"{epochs:.2g} epochs, where fewer than {WORTHWHILE_EPOCHS:g} may end below one shot",
        )  # fmt: skip
    epochs = round(min(epochs, MOST_EPOCHS), 2)
    return Choice(
        epochs,
        f"one-shot: {measured}, and the rest of {readable(budget)} pays for {epochs:g} epochs of recovery",
    )


def chosen_for_epochs(epochs: float, finetune_epochs: float) -> Choice:
    """Pick what to do with a number of epochs: those of pruning and of recovery are all for recovery."""
    total = epochs + finetune_epochs if epochs else 0.0
    if total < WORTHWHILE_EPOCHS:
        return Choice(
            0.0, f"one-shot: epochs is {epochs:g}, and fewer than {WORTHWHILE_EPOCHS:g} may end below one shot"
        )
    return Choice(total, f"one-shot: epochs is {epochs:g}, all of them for recovery")


def check_method(config: PruneConfig, *, has_data: bool) -> None:
    """Make sure that a method has what it picks by and works on.

    :raises SettingsError: for a budget where nothing is picked, none where it is, and for training without data.
    """
    if config.method == "auto":
        if config.time_budget is None and config.epochs is None:
            raise SettingsError("method='auto' picks by a budget: give time_budget='10m', say, or epochs")
        if config.time_budget is not None and config.epochs is not None:
            raise SettingsError(
                f"time_budget={config.time_budget:g} and epochs={config.epochs:g} are two budgets; give one of them"
            )
    elif config.time_budget is not None:
        raise SettingsError(f"time_budget is what method='auto' picks by; the method is {config.method!r}")
    if not has_data and config.method in ("gates", "auto"):
        raise SettingsError(f"method={config.method!r} needs a train_dataset; without data prune knows one method")


def measure_pace(
    model: PreTrainedModel,
    structure: Structure,
    teacher: PreTrainedModel | None,
    batches: Batches,
    *,
    steps_per_epoch: int,
    target: float,
) -> Pace:
    """Time a few training steps of a model, and its teacher on the same rows; weights and random state stay.

    All processes go by what the first one measures.

    :param batches: of this process, from the first one on.
    :param target: the sparsity that one shot would go to.
    """
    inputs = [model_inputs(to_model(batch, model), model) for batch in itertools.islice(batches, 1 + _STEPS)]
    positions = sum(counted(model, structure, batch) for batch in inputs) / len(inputs)

    def seconds(compute: Callable[[Batch], None]) -> float:
        rows = itertools.cycle(inputs)
        (times,) = in_turn([lambda: compute(next(rows))], model.device, runs=_STEPS, warmup=1)
        return statistics.median_low(times)

    with evaluating(model), torch.random.fork_rng():  # which puts the modes back
        model.train()
        step = seconds(partial(_step, model))
    asked = 0.0 if teacher is None else seconds(partial(_teach, teacher))
    rows = min(FIT_POSITIONS / max(positions, 1.0), float(len(batches)))
    return by_first(lambda: Pace(step, asked, steps_per_epoch, rows * one_shot_steps(rounds(1 - target)) * step))


def _step(model: PreTrainedModel, batch: Batch) -> None:
    """A forward and a backward pass, of which nothing is kept."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = torch.stack([part.float().square().mean() for part in _outputs(model, batch)]).sum()
    if learning:
        torch.autograd.grad(loss, learning, allow_unused=True)


@torch.no_grad()
def _teach(teacher: PreTrainedModel, batch: Batch) -> None:
    _outputs(teacher, batch)


def _outputs(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, ...]:
    return predictions(model(**batch, **supported_kwargs(model, return_dict=True)))


# One shot.


def one_shot(
    model: PreTrainedModel,
    structure: Structure,
    batches: Batches,
    settings: ResolvedSettings,
    target: Target,
    on_progress: Progress | None = None,
) -> Left | None:
    """Prune in one shot: all of the way with method="one-shot", else as far as gates are to start from.

    Up to some sparsity, pruning block by block with reconstruction costs next to nothing. Gates then decide only what
    is hard to decide, on a smaller model, whose steps are cheaper.

    :param batches: of the full data set, the same for every process.
    :param target: of the run; gates start a unit short of it at least.
    :return: None where gates start on all of the model: by the settings, without a unit kind that this works on, with
        too few rows for the statistics, or where the target is out of reach from there.
    :raises DataError: with method="one-shot", when there are too few rows for the statistics.
    :raises TargetError: with it, when no sizes meet the target without cutting hidden dimensions.
    """
    if settings.method == "one-shot":
        small, plan = _prune(model, structure, batches, settings, target, on_progress)
        if target.measure is None:
            target.check(structure, plan.kept)
        return small, plan
    if not settings.starts_from_one_shot or not can_start(structure, settings.one_shot_units) or target.uniform:
        return None
    here = target.kept_share(structure)  # less than 1 where the model is what an earlier run has left
    aim = 1 - target.share
    left = max(here * (aim / here) ** settings.one_shot_share, aim + _short_of(structure, target, settings))
    if left >= here:
        return None
    try:
        small, plan = _prune(model, structure, batches, settings, target.at(1 - left), on_progress)
    except (DataError, TargetError):
        return None
    return (small, plan) if can_go_on(structure.cut(plan.kept), target, settings) else None


def _prune(
    model: PreTrainedModel,
    structure: Structure,
    batches: Batches,
    settings: ResolvedSettings,
    target: Target,
    on_progress: Progress | None,
) -> Left:
    """Prune in one shot, labels unseen; the first process does, the others get the outcome."""
    rows = calibration(model, structure, batches)
    made: list[PreTrainedModel] = []

    def prune() -> Plan:
        with evaluating(model):
            pruning = RoundPruning(
                model, structure, rows, target,
                units=settings.one_shot_units, seed=settings.seed, reconstruct=settings.repair is not False,
            )  # fmt: skip
            plan, small = pruning.run(on_progress)
        made.append(small)
        return plan

    plan = by_first(prune)
    small = made[0] if made else compacted(model, structure, plan)
    for parameter in small.parameters():
        broadcast(parameter.data)
    return small, plan


def _short_of(structure: Structure, target: Target, settings: ResolvedSettings) -> float:
    """Return the least distance from a target at which one shot stops, as a share of the dense model's cost."""
    cost, sizes = target.cost(structure), structure.sizes
    dense = cost.exact(sizes)
    cut = structure.present(settings.one_shot_units)
    inner = [group for group in cut if group.kind in ("heads", "intermediate")]
    unit = max(dense - cost.exact({**sizes, group.name: group.size - 1}) for group in inner) / target.total
    return max(
        unit,
        target.tolerance if target.needs_levels(structure) else 0.0,
        _ESTIMATE * (1 - target.share) if target.measure is not None else 0.0,
    )


def can_go_on(structure: Structure, target: Target, settings: ResolvedSettings) -> bool:
    """Return whether a target can be reached from a smaller model; where units go in large steps it need not be."""
    units = tuple({group.unit for group in structure.present(settings.units)})
    if not units or target.removed(structure) <= 0:
        return False
    try:
        check_target(structure, target, units)
    except TargetError:
        return False
    return True

"""Pruning inside a stock `transformers.Trainer`: its loop trains the weights, a callback everything else."""

from __future__ import annotations

import math
import warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import TrainerCallback

from cofiprune.accounting import layer_parameters, sparsity
from cofiprune.adapter import structure as structure_of
from cofiprune.data.batches import Batches
from cofiprune.errors import SettingsError, TrainingError
from cofiprune.hooks import same_random_state
from cofiprune.masking import attach_to
from cofiprune.plan import Plan
from cofiprune.selection.reachable import check_target
from cofiprune.selection.target import Target, check_fraction
from cofiprune.structure import Structure
from cofiprune.training.arguments import (
    check_learnable,
    check_trainable,
    check_weights,
    resolve_teacher,
    take_masks_off,
    target_for,
)
from cofiprune.training.checkpoint import SavedRun
from cofiprune.training.config import PruneConfig
from cofiprune.training.identity import identity
from cofiprune.training.learner import GateLearner
from cofiprune.training.resolved import Facts, Schedule, resolve, unit_kinds
from cofiprune.training.result import PruneResult, figures_around, metrics_of
from cofiprune.training.start import one_shot
from cofiprune.training.trainer.checks import callback_config, check_arguments, rows_again
from cofiprune.training.trainer.forward import RemainingMasks
from cofiprune.training.trainer.run import CallbackRun, bring_in, load_beside

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SPEED = ("_runtime", "_per_second", "_preparation_time")


class PruningCallback(TrainerCallback):
    """Prunes the model of a `transformers.Trainer` while it trains.

    Gates, the sparsity constraint and, with a teacher, distillation run inside the Trainer's steps. As in
    `cofiprune.prune` part of the model goes in one shot when training begins (`one_shot_share`). The target rises over
    the first eighth of the steps; then the structure is decided, at exactly the target, and the rest trains what is
    left. The model ends with masks attached, for `cofiprune.compact(model)`, and `result` holds a `PruneResult`.
    """

    def __init__(
        self,
        target_sparsity: float = 0.9,
        teacher: PreTrainedModel | Literal["self"] | None = None,
        config: PruneConfig | None = None,
        **settings: Any,
    ) -> None:
        """Check what can be checked without the model; the rest is checked when training begins.

        :param target_sparsity: share of the parameters of the encoder's layers to remove, in (0, 1).
        :param teacher: a model to learn from, "self" for a frozen copy of the model as it comes, None to train on the
            Trainer's loss alone.
        :param settings: fields of `PruneConfig`, on top of `config`, that the Trainer's arguments do not decide.
            Their epochs are those of the Trainer.
        :raises CofipruneError: for wrong arguments.
        """
        self.target = check_fraction(target_sparsity)
        self.config = callback_config(config, settings)
        self.teacher = teacher
        self.result: PruneResult | None = None
        """The finished run; None until then."""
        self._run: CallbackRun | None = None
        self._fingerprint: dict[str, Any] = {}
        self._batches: int | None = None

    @property
    def plan(self) -> Plan | None:
        """The plan, from the step on at which it is decided; None before."""
        if self._run is not None:
            return self._run.plan
        return None if self.result is None else self.result.plan

    @property
    def history(self) -> list[dict[str, Any]]:
        """One entry per log of the Trainer, as far as the run has come."""
        if self._run is not None:
            return self._run.state.history
        return [] if self.result is None else self.result.history

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check everything, then attach the gates.

        :raises CofipruneError: for what `cofiprune.prune` refuses, and for what a callback cannot follow.
        """
        if self._run is not None:  # an earlier run that was cut off
            self._run.finish()
            self._run.masks.detach()
        self._run, self.result = None, None
        with same_random_state():  # the Trainer goes on as it would without a callback
            self._run = self._begun(args, state, kwargs["model"], kwargs.get("train_dataloader"))

    def _begun(self, args: Any, state: Any, model: PreTrainedModel, loader: Any) -> CallbackRun:
        """Check everything, then attach the gates; a model that cannot be trained is left as it was."""
        structure = structure_of(model)
        target = target_for(model, structure, self.config, "target_sparsity", self.target)
        check_target(structure, target, self.config.units)
        check_arguments(args, state, model, taught=self.teacher is not None)
        check_weights(model)
        check_trainable(model, gated=True)
        teacher = resolve_teacher(self.teacher, model, of_dense=True)
        rows = rows_again(loader, model, structure, self.config, args, taught=teacher is not None)
        self._batches = _length(loader)
        facts = self._facts(args, state, structure, labelled=rows is None or rows.labelled)
        settings = resolve(self.config, facts)
        if teacher is not None and rows is not None:
            check_learnable(model, teacher, rows, settings)
        Schedule.for_pruning(settings, facts.steps_per_epoch, in_trainer=True)  # whether there are enough of them
        saved = self._saved(args, state, model, structure)
        take_masks_off(model, quietly=saved is not None, stacklevel=5)
        with ExitStack() as undo:
            learner = self._learner(model, structure, target, rows, facts, saved, undo)
            run = CallbackRun(model, learner, teacher, rows, args, undo)
            if self.teacher == "self" and teacher is not None:
                run.state.modules["teacher"] = teacher
            if saved is not None:
                run.restore(saved)
            run.undo = run.hooks.undo = undo.pop_all()  # the first step may still go wrong
        return run

    def _learner(
        self,
        model: PreTrainedModel,
        structure: Structure,
        target: Target,
        rows: Batches | None,
        facts: Facts,
        saved: SavedRun | None,
        undo: ExitStack,
    ) -> GateLearner:
        """Prune in one shot, or as a saved run was; set up gates over what is left of the model.

        :param undo: will make the model what it was.
        """
        start = None
        if saved is None and rows is not None:
            start = one_shot(model, structure, rows, resolve(self.config, facts), target)
        plan = Plan.from_values(structure, {}) if start is None else start[1]
        if saved is not None:
            plan = Plan.from_dict(saved.extra["start"])
        settings = resolve(self.config, replace(facts, from_one_shot=plan.kept != structure.sizes))
        schedule = Schedule.for_pruning(settings, facts.steps_per_epoch, in_trainer=True)
        masks = attach_to(model, structure)
        undo.callback(masks.detach)
        if start is not None:
            bring_in(model, structure, *start, undo)
        share = 1 - sparsity(layer_parameters(structure), structure, plan.kept)
        learner = GateLearner(RemainingMasks(masks, plan), target, settings, schedule, layers_left=share)
        if settings.warm_start and saved is None and rows is not None:
            learner.order(model, rows)
        return learner

    def _facts(self, args: Any, state: Any, structure: Structure, *, labelled: bool) -> Facts:
        """Gather what settings depend on.

        :raises SettingsError: for epochs where the data set has no length.
        """
        per_epoch: int = state.max_steps
        if self._batches is not None:
            per_epoch = math.ceil(self._batches / args.gradient_accumulation_steps)
        for name in ("pre_finetune_epochs", "freeze_epochs", "sparsity_warmup_epochs"):
            epochs = getattr(self.config, name)
            if self._batches is None and epochs:
                raise SettingsError(f"{name}={epochs:g} needs a data set with a length: this one has no epochs")
        return Facts(
            per_epoch,
            self.target,
            units=unit_kinds(structure),
            taught=self.teacher is not None,
            labelled=labelled,
            trainer_steps=state.max_steps,
        )

    def _saved(self, args: Any, state: Any, model: PreTrainedModel, structure: Structure) -> SavedRun | None:
        """Note what a resumed run must have in common with this one; return what it goes on from, if it does."""
        self._fingerprint = {
            "target_sparsity": self.target,
            "max_steps": state.max_steps,
            **identity(model, self.teacher, self.config, with_weights=False),
        }
        return load_beside(args, state.global_step, self._fingerprint, model) if state.global_step else None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the next forwards run under samples of the gates."""
        self._running().begin_step(state.global_step, self._batches)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Step gates and multipliers.

        :raises TrainingError: when the Trainer's loss did not reach them, or was not a number.
        """
        self._running().step(state.global_step, kwargs["optimizer"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide the structure when the gates have had their steps."""
        if self._running().end_step(state.global_step):
            # What was best so far had another structure: the weights of those checkpoints do not fit this one.
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add to the Trainer's log how far pruning is."""
        run = self._run
        if run is None or logs is None:
            return
        more = run.progress(state.global_step - 1, trained=not _is_evaluation(logs))
        logs.update(more)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(more)
        phase = "prune" if run.plan is None else "recover"
        run.state.history.append({"phase": phase, "step": state.global_step, "seconds": round(run.seconds, 3), **logs})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the gates to a checkpoint."""
        if self._run is not None and args.should_save:
            self._run.save(Path(args.output_dir) / f"checkpoint-{state.global_step}", self._fingerprint)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model with masks of zeros and ones of exactly the target sparsity."""
        run = self._running()
        plan = run.plan
        if plan is None:
            warnings.warn(
                f"training stopped after {state.global_step} of {state.max_steps} steps, before the structure was "
                "decided: the model is cut to the target now, and was not trained so. What is left recovers with "
                "cofiprune.finetune(model, ...)",
                UserWarning,
                stacklevel=2,
            )
            plan = run.decide()
        run.finish()
        best = state.best_global_step if args.load_best_model_at_end else None
        decided = [entry for entry in run.state.history if entry["phase"] == "recover"]
        metrics = {name: value for name, value in metrics_of(decided, best).items() if not name.endswith(_SPEED)}
        settings = run.learner.settings
        dense, small = figures_around(run.model, structure_of(run.model), plan, settings, {}, metrics)
        self.result = PruneResult(
            run.model,
            plan,
            run.masks.dense.sparsity(),
            run.masks.dense.model_sparsity(),
            metrics,
            run.state.history,
            run.seconds,
            best,
            dense=dense,
            pruned=small,
            settings=settings,
        )
        self._run = None

    def _running(self) -> CallbackRun:
        if self._run is None:
            raise TrainingError("PruningCallback was added while training ran; add it before Trainer.train()")
        return self._run


def _is_evaluation(values: dict[str, Any]) -> bool:
    return any(name.startswith("eval_") for name in values)


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None

"""The pruning phase: gates and weights learn together; then the plan is decided."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from cofiprune.compaction import compact
from cofiprune.errors import TrainingError
from cofiprune.hooks import frozen
from cofiprune.masking import attach
from cofiprune.masks import MaskRegistry
from cofiprune.oneshot.fisher import measured_importance
from cofiprune.plan import Plan
from cofiprune.selection.target import Target
from cofiprune.training.gating import Gating
from cofiprune.training.loop import Loop
from cofiprune.training.opening import Opening
from cofiprune.training.projection import cut_projection
from cofiprune.training.refit import refit
from cofiprune.training.schedule import Schedule, gate_rate, gated_rates, pruning_rate
from cofiprune.training.shrinking import Learner, Shut, looks
from cofiprune.training.stage import Finished, Stage
from cofiprune.training.start import Start, can_go_on
from cofiprune.training.state import RunState, SavedRun

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class GatedPhase:
    """Gates and weights, or gates alone, on the model or on what one shot has left of it."""

    def __init__(self, stage: Stage, opening: Opening) -> None:
        self.stage = stage
        self.opening = opening

    def run(self, masks: MaskRegistry, target: Target, saved: SavedRun | None) -> tuple[Plan, Finished, Schedule]:
        """The pruning phase: gates and weights learn together; then the plan is decided."""
        try:
            start = self.opening.start(target, saved)
        except BaseException:
            masks.detach()  # nothing was changed yet
            raise
        schedule = Schedule.for_pruning(self.stage.config, len(self.stage.batches), from_one_shot=start is not None)
        if start is None:
            decided, done = self._learn_on(self.stage.model, masks, 1.0, target, schedule, saved, None)
            return self._refitted(self.stage.model, masks, decided, None), done, schedule
        with attach(start.small) as inner:
            try:
                decided, done = self._learn_on(start.small, inner, start.share, target, schedule, saved, start)
            except TrainingError:
                raise  # the whole model has its own weights still
            except BaseException:
                start.write_back(masks, Plan.from_masks(inner))
                raise
            decided = self._refitted(start.small, inner, decided, start)
        return start.write_back(masks, decided), done, schedule

    def _learn_on(
        self,
        model: PreTrainedModel,
        masks: MaskRegistry,
        share: float,
        target: Target,
        schedule: Schedule,
        saved: SavedRun | None,
        start: Start | None,
    ) -> tuple[Plan, Finished]:
        """Learn gates and weights on the model, or on what the start has left of it."""
        config = self.stage.config
        chosen = [group.name for group in masks.structure.present(config.units)]
        gating = Gating(masks, chosen, target, config, schedule, share=share)
        if config.warm_start and saved is None:
            self.stage.batches.set_epoch(0)
            importance = measured_importance(model, masks, chosen, self.stage.batches, seed=config.seed)
            gating.gates.initialise_from(importance, spread=config.warm_start_spread)
        learner = self._learner(model, gating)
        learner.state.extra = {} if start is None else {"start": start.plan.to_dict()}
        if start is not None and saved is None:
            self.opening.log(learner.state, start)
        try:
            self._learn_and_shrink(learner, schedule, saved)
            decided = self._decided(learner.gating, learner.model)
            learner.gating.settle()
        except TrainingError:
            raise  # the model has the weights with which it began, or shrank
        except BaseException:
            learner.write_back(model, masks)
            raise
        learner.write_back(model, masks)
        projection = learner.projection
        if projection is not None and "hidden" in decided.keep:
            projection = cut_projection(projection, decided.keep["hidden"])
        plan = decided if learner.plan is None else learner.plan.then(decided)
        return plan, Finished(learner.state, projection)

    def _learner(self, model: PreTrainedModel, gating: Gating) -> Learner:
        """A model under gates, at the beginning of the phase."""
        shut, projection = Shut(gating.gates), self.stage.projection(model, None)
        return Learner(model, gating, shut, projection, self._learning_state(model, gating, shut, projection))

    def _learning_state(
        self, model: PreTrainedModel, gating: Gating, shut: Shut, projection: nn.Linear | None, **more: nn.Module
    ) -> RunState:
        config = self.stage.config
        groups = self.stage.learning(model, projection) if config.trains_weights else []
        groups += [
            {"params": list(gating.gates.parameters()), "weight_decay": 0.0},
            gating.constraint.ascent_group(gate_rate(config, gating.schedule.gated)),
        ]
        modules = self.stage.modules(
            model, projection, gates=gating.gates, constraint=gating.constraint, shut=shut, **more
        )
        return RunState("prune", modules, torch.optim.AdamW(groups, lr=pruning_rate(config, gating.goal.share)))

    def _learn_and_shrink(self, learner: Learner, schedule: Schedule, saved: SavedRun | None) -> None:
        """Run the phase; at each look at the gates, go on with a smaller model where enough has long been shut."""
        config, steps = self.stage.config, schedule.before + schedule.gated
        whole = learner.model

        def with_optimizer(smaller: Learner) -> RunState:
            return self._learning_state(smaller.model, smaller.gating, smaller.shut, smaller.projection, full=whole)

        def begin(saved: SavedRun | None = None) -> Loop:
            trained = len(learner.state.optimizer.param_groups) - 2
            rates = gated_rates(config, schedule, learner.gating.goal.share, trained)
            return self.stage.loop(
                learner.state, learner.model, learner.projection, rates, steps, learner.gating, saved
            )

        if saved is not None and "shrunk" in saved.extra:
            plan = Plan.from_dict(saved.extra["shrunk"])
            learner.shrink(plan, compact(learner.model, plan), with_optimizer)
        goal, structure = learner.gating.goal, learner.gating.masks.structure
        shrinks = config.compact_in_training and config.trains_weights and not goal.needs_levels(structure)
        pauses = [*(looks(schedule) if shrinks else []), steps]
        modules = [each for each in (learner.model, learner.projection) if each is not None]
        with frozen(*([] if config.trains_weights else modules)):  # gates alone learn, or weights too
            loop = begin(saved)
            while learner.state.step < steps:
                if learner.state.step in pauses:
                    learner.gating.masks.unbind()
                    learner.shut.look(learner.gating.gates)
                    found = learner.shut.plan(learner.gating.gates, learner.gating.masks, goal)
                    if found is not None:
                        loop.leave()  # a copy would keep what Accelerate has put on the model
                        small = compact(learner.model, found)
                        if can_go_on(small, goal, config):
                            learner.shrink(found, small, with_optimizer)
                        loop = begin()
                loop.run(next(step for step in pauses if step > learner.state.step))

    def _refitted(self, model: PreTrainedModel, masks: MaskRegistry, decided: Plan, start: Start | None) -> Plan:
        """Refit what a plan leaves of a model, where that is asked for; the scales of the plan are then in its weights.

        What is reproduced is the model as it came where no weights were trained, else the one under its gates.
        """
        if not self.stage.config.repairs:
            return decided
        if not self.stage.config.trains_weights:
            masks.set_plan(Plan.from_values(masks.structure, {}))
        return refit(
            model, masks, decided, self.stage.calibrated,
            whole=None if start is None or self.stage.config.trains_weights else self.stage.model,
            above=None if start is None else start.plan, seed=self.stage.config.seed,
        )  # fmt: skip

    def _decided(self, gating: Gating, model: PreTrainedModel) -> Plan:
        """What stays; where that is measured, the first process does."""
        accelerator = self.stage.session.accelerator
        if accelerator.num_processes == 1 or gating.goal.measure is None:
            return gating.decide(lambda plan: compact(model, plan))
        outcome: list[Any] = [None]
        if accelerator.is_main_process:
            outcome = [gating.decide(lambda plan: compact(model, plan)).to_dict()]
        broadcast_object_list(outcome)
        return Plan.from_dict(outcome[0])

"""The phases of a run, in their order: one shot, gates, reconstruction, recovery. Each takes the run one step on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list

from cofiprune.accounting import layer_parameters
from cofiprune.adapter import structure as structure_of
from cofiprune.compaction.slicing import compacted
from cofiprune.errors import CheckpointError, SettingsError
from cofiprune.hooks import evaluating, frozen
from cofiprune.masking import attach, attach_to, masks_of
from cofiprune.measure.summary import dense_structure
from cofiprune.oneshot.fisher import measured_importance
from cofiprune.oneshot.reconstruction import Repair
from cofiprune.oneshot.with_data import calibration, position_weights
from cofiprune.plan import Plan
from cofiprune.record import recorded_sizes
from cofiprune.selection.target import Target
from cofiprune.training.budget import Choice, choose, chosen_for_epochs, measure_pace
from cofiprune.training.checks import check_learnable
from cofiprune.training.learner import GateLearner, check_steps, projection_pairs, transplant, weight_pairs
from cofiprune.training.loop import Loop
from cofiprune.training.run import Run
from cofiprune.training.schedule import Schedule, gated_rates, rate
from cofiprune.training.start import Left, can_go_on, one_shot_start, prune_once

if TYPE_CHECKING:
    pass


def prune_with_data(run: Run, target: Target) -> None:
    """Prune by the configuration's method, and let what is left recover for the epochs that it has for that."""
    schedule = Schedule.for_pruning(run.settings, len(run.batches))
    _check_before(run, schedule)
    run.identify(method="prune", **target.identity())
    saved = run.saved
    with run.running():
        if saved is None:
            start(run, target)
        else:
            run.state.extra = dict(saved.extra)
            run.use_plan(Plan.from_dict(saved.extra["plan"]))
        run.know(from_one_shot=run.state.extra["from_one_shot"])
        if saved is not None and saved.phase == "recover":
            recover(run, saved.extra["steps"])
            return
        settings = run.settings
        if settings.method == "one-shot":
            decided = Plan.from_values(run.small_structure, {})
        else:
            schedule = Schedule.for_pruning(settings, len(run.batches))
            decided = learn_gates(run, target, schedule)
        steps = Schedule.for_recovery(settings, schedule, len(run.for_recovery))
        if settings.method != "one-shot" and settings.repairs:
            reconstruct(run, decided)
        elif steps:
            run.cut(decided)
        if steps:
            recover(run, steps)
        elif run.evaluate is not None and settings.method != "one-shot":
            run.log(run.evaluate(run.small))  # what was logged last had other masks


def _check_before(run: Run, schedule: Schedule) -> None:
    """Make sure that there is something to learn from, all through the run."""
    settings = run.settings
    if settings.trains:
        check_learnable(run.model, run.teacher, run.batches, settings, cuts_hidden="hidden" in settings.units)
    steps = Schedule.for_recovery(settings, schedule, len(run.for_recovery))
    if settings.metric_for_best_model is not None and not steps:
        raise SettingsError(
            "metric_for_best_model chooses among the evaluations of the recovery, and there is none: "
            "no epochs are left for it by finetune_epochs and freeze_epochs"
        )
    if settings.method != "one-shot" and settings.repairs:
        calibration(run.model, run.calibration.from_start())  # raises where there are too few rows


def train(run: Run) -> None:
    """Train what the masks on the model keep, or all of it: `finetune`."""
    masks = masks_of(run.model)
    plan = Plan.from_values(run.structure, {} if masks is None else dict(masks.items()))
    cuts_hidden = plan.kept.get("hidden", run.model.config.hidden_size) != run.model.config.hidden_size
    run.know(dense=plan.kept == run.structure.sizes and recorded_sizes(run.model.config) is None)
    check_learnable(run.model, run.teacher, run.batches, run.settings, cuts_hidden=cuts_hidden)
    if not run.settings.finetune_epochs:
        raise SettingsError("finetune with epochs=0 would train nothing; it takes more than 0, fractions included")
    run.batches = run.for_recovery
    run.identify(method="finetune")
    if run.saved is not None and Plan.from_dict(run.saved.extra["plan"]).keep != plan.keep:
        raise CheckpointError(f"{run.saved.folder} is of a run with other masks on the model: attach those first")
    schedule = Schedule.for_training(run.settings.finetune_epochs, run.settings, len(run.batches))
    with run.running():
        run.use_plan(plan)
        recover(run, max(schedule.total, 1))


def pick_method(run: Run, target: Target) -> None:
    """Pick a method and epochs by the budget, say so, and go by it: `method="auto"`.

    :raises SettingsError: when the budget is too small for anything.
    """
    config = run.config
    saved = None if run.folder is None else run.folder / "choice.json"
    if run.resume and saved is not None and saved.exists():
        choice = Choice(**json.loads(saved.read_text()))
    elif config.time_budget is None:
        choice = chosen_for_epochs(config.pruning_epochs, config.recovery_epochs)
    else:
        steps = Schedule.for_training(1, run.settings, len(run.batches)).total
        batches = run.batches.from_start()
        pace = measure_pace(run.model, run.teacher, batches, steps_per_epoch=steps, target=target.share)
        choice = choose(pace, config.time_budget, share=1 - target.share)
    if saved is not None and run.accelerator.is_main_process:
        saved.parent.mkdir(parents=True, exist_ok=True)
        saved.write_text(json.dumps(asdict(choice)))
    settings = {"method": "one-shot", "finetune_epochs": choice.finetune_epochs, "time_budget": None}
    run.config = config.model_copy(update=settings)
    run.know()
    run.reason = choice.reason
    if config.progress and run.accelerator.is_main_process:
        run.display.console.print(f"cofiprune picked {choice.reason}", highlight=False, soft_wrap=True)


# One shot.


def start(run: Run, target: Target) -> None:
    """Prune in one shot: all of the way, or as far as gates are to start from; else start with a copy of the model."""
    began = time.perf_counter()
    if run.settings.method == "one-shot":
        found: Left | None = prune_once(run.model, run.calibration, run.settings, target, _progress(run))
    else:
        found = one_shot_start(run.model, run.calibration, run.settings, target, _progress(run))
    run.state.extra["from_one_shot"] = found is not None
    if found is None:
        run.use_plan(Plan.from_values(run.structure, {}))
        return
    run.state.phase, run.state.seconds = "one-shot", time.perf_counter() - began
    run.use(*found)
    measured = {} if run.evaluate is None else run.evaluate(run.small)
    run.log({"sparsity": 1 - run.layers_left, **measured})


def _progress(run: Run) -> Callable[[float], None]:
    run.display.begin("one-shot", total=100, done=0)

    def progress(share: float) -> None:
        run.display.reach(round(100 * share))
        if run.interrupt.requested is not None and run.accelerator.num_processes == 1:
            run.interrupt.stop("Stopped in the one-shot stage: the model is as it was.")

    return progress


# Gates.


def learn_gates(run: Run, target: Target, schedule: Schedule) -> Plan:
    """Learn gates and weights, or gates alone; decide what stays of the small model, and set its masks to that."""
    settings, steps = run.settings, schedule.before + schedule.gated
    masks = attach_to(run.small, run.small_structure)
    names = [group.name for group in masks.structure.present(settings.units)]
    learner = GateLearner(masks, names, target, settings, schedule, layers_left=run.layers_left)
    if run.saved is not None:
        learner.count_from(run.state.extra["origin"])
    elif settings.warm_start:
        importance = measured_importance(run.small, masks, names, run.batches.from_start(), seed=settings.seed)
        learner.gates.initialise_from(importance, spread=settings.warm_start_spread)
    run.state.extra["origin"] = learner.origin()
    run.learn_from(fitted=False)
    run.state.begin("prune")
    _begin(run, learner)
    run.go_on()
    checks = check_steps(schedule) if learner.shrinks() else []
    modules = [each for each in (run.small, run.objective.projection) if each is not None]
    with frozen(*([] if settings.trains_weights else modules)):
        loop = _loop(run, learner, steps)
        while run.state.step < steps:
            found = learner.long_closed() if run.state.step in checks else None
            if found is not None:
                loop.leave()  # a copy would keep what Accelerate has put on the model
                learner = _shrunk(run, learner, found)
                loop = _loop(run, learner, steps)
            loop.train(next(step for step in (*checks, steps) if step > run.state.step))
    decided = _decided(run, learner)
    if settings.repairs:
        learner.settle()  # what is reconstructed is the model under its gates
    else:
        learner.masks.set_plan(decided)
    return decided


def _begin(run: Run, learner: GateLearner) -> None:
    """Set up the optimiser of a learner and of what it learns along with."""
    weights = run.weight_groups() if run.settings.trains_weights else []
    run.learn(torch.optim.AdamW([*weights, *learner.groups()], lr=run.settings.learning_rate), gates=learner)


def _loop(run: Run, learner: GateLearner, steps: int) -> Loop:
    assert run.state.optimizer is not None
    trained = len(run.state.optimizer.param_groups) - len(learner.groups())
    rates = gated_rates(run.settings, learner.schedule, trained)
    return Loop(run, total=steps, rates=rates, learner=learner)


def _shrunk(run: Run, learner: GateLearner, plan: Plan) -> GateLearner:
    """Go on with what a plan leaves of the small model, the optimiser's moments cut to size.

    :return: the learner itself where the target could not be met from there.
    """
    small = compacted(run.small, run.small_structure, plan)
    masks = attach(small)
    if not can_go_on(masks.structure, learner.target, run.settings):
        return learner
    model, projection, optimizer = run.small, run.objective.projection, run.state.optimizer
    run.cut(plan, small)
    smaller = learner.on(masks, plan, layers_left=run.layers_left)
    _begin(run, smaller)
    assert optimizer is not None
    assert run.state.optimizer is not None
    pairs = [
        *weight_pairs(model, learner.masks.structure, small, plan),
        *projection_pairs(projection, run.objective.projection, plan),
        *learner.pairs(smaller, plan),
    ]
    transplant(optimizer, run.state.optimizer, pairs)
    return smaller


def _decided(run: Run, learner: GateLearner) -> Plan:
    """What stays; where that is measured, the first process does."""

    def decide() -> Plan:
        return learner.decide(lambda plan: compacted(run.small, run.small_structure, plan))

    if run.accelerator.num_processes == 1 or learner.target.measure is None:
        return decide()
    outcome: list[Any] = [decide().to_dict() if run.accelerator.is_main_process else None]
    broadcast_object_list(outcome)
    return Plan.from_dict(outcome[0])


# After the decision.


def reconstruct(run: Run, decided: Plan) -> None:
    """Refit what a plan leaves of the small model, by least squares, so that it takes over what is gone.

    What is reproduced is the model under its gates where weights were trained along with them, else the dense one.
    """
    rows = calibration(run.small, run.calibration.from_start())
    small = compacted(run.small, run.small_structure, decided)
    dense, structure, plan = run.small, run.small_structure, decided
    if not run.settings.trains_weights:
        dense, structure, plan = run.model, run.structure, run.plan.then(decided)
    with evaluating(dense, small):
        weights = position_weights(dense, rows, seed=run.settings.seed)
        Repair(
            dense, structure, small, structure_of(small), plan, rows,
            ridge=None, weights=weights, everything=True,
        ).run()  # fmt: skip
    run.cut(decided, small)


def recover(run: Run, steps: int) -> None:
    """Train what is left for some optimiser steps."""
    state = run.state
    if state.phase != "prune":  # else the loss of the gates, with the projection that it has learned, goes on
        run.learn_from(fitted=True)
    groups = run.weight_groups()
    run.know(kept_share=_kept_share(run))
    settings = run.settings
    state.begin("recover")
    run.learn(torch.optim.AdamW(groups, lr=settings.finetune_learning_rate))
    state.extra["steps"] = steps
    if run.target is not None:
        _take_recovery_batches(run)
    run.go_on()
    warmup = round(settings.warmup_ratio * steps)

    def rates(step: int) -> list[float]:
        factor = rate(settings.finetune_lr_scheduler_type, step, steps, warmup)
        return [settings.finetune_learning_rate * factor] * len(groups)

    Loop(run, total=steps, rates=rates).train()
    if state.best is not None:
        run.small.load_state_dict(state.best["model"])


def _take_recovery_batches(run: Run) -> None:
    """Go on with the batches of the recovery, at the same place of the epoch."""
    state = run.state
    taken = state.extra["taken"] if run.saved is not None else state.batches_seen
    state.extra["taken"] = taken
    before, run.batches = run.batches, run.for_recovery
    run.taken = [(before, taken)]
    state.batches_seen = round(taken * len(run.batches) / len(before))


def _kept_share(run: Run) -> float:
    """Parameters in the layers of the small model by those of the dense model that it comes from."""
    cut_before = recorded_sizes(run.model.config) is not None
    dense = dense_structure(run.model) if cut_before else run.structure
    return layer_parameters(run.structure).exact(run.plan.kept) / layer_parameters(dense).exact(dense.sizes)

"""The phases of a run, in their order: one shot, gates, reconstruction, recovery. Each takes the run one step on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from cofiprune.accounting import Cost, layer_parameters, model_parameters
from cofiprune.compaction.slicing import compacted
from cofiprune.data.batches import Batches
from cofiprune.errors import CheckpointError, SettingsError
from cofiprune.hooks import evaluating, frozen, same_random_state
from cofiprune.masking import attach_to, masks_of
from cofiprune.measure.figures import Figures, Subject, figures_of
from cofiprune.measure.summary import dense_structure
from cofiprune.oneshot.reconstruction import Reconstruction
from cofiprune.oneshot.sensitivity import position_weights
from cofiprune.oneshot.with_data import calibration
from cofiprune.plan import Plan
from cofiprune.record import sizes_of
from cofiprune.selection.target import Target
from cofiprune.structure import Structure
from cofiprune.training.arguments import check_learnable
from cofiprune.training.learner import GateLearner, check_steps, transplant
from cofiprune.training.loop import Loop
from cofiprune.training.processes import by_first
from cofiprune.training.resolved import Schedule
from cofiprune.training.result import PruneResult, metrics_of, reached
from cofiprune.training.run import Run
from cofiprune.training.start import can_go_on, one_shot

if TYPE_CHECKING:
    pass


def prune_with_data(run: Run, target: Target) -> None:
    """Prune by the configuration's method, and let what is left recover for the epochs that it has for that."""
    _check_before(run)
    run.identify(method="prune", **target.identity())
    saved = run.saved
    if run.reason and run.config.progress and run.accelerator.is_main_process:
        console = run.display.console
        console.print(f"cofiprune picked {run.reason}", highlight=False, soft_wrap=not console.is_jupyter)
    with run.running():
        if saved is None:
            measure_before(run)
            start(run, target)
        else:
            run.state.extra = dict(saved.extra)
            run.use(Plan.from_dict(saved.extra["plan"]))
        run.settle(from_one_shot=run.state.extra["from_one_shot"])
        if saved is not None and saved.phase == "recover":
            recover(run, saved.extra["steps"])
            return
        gated = run.settings.method != "one-shot"
        schedule = Schedule.for_pruning(run.settings, run.steps_in(run.batches))
        decided = learn_gates(run, target, schedule) if gated else None
        steps = schedule.recovery(run.settings, run.steps_in(run.recovery_batches))
        if decided is not None and run.settings.repair is True:
            reconstruct(run, decided)
        elif decided is not None and steps:
            run.cut(decided)
        if steps:
            recover(run, steps)
        elif run.evaluate is not None and gated:
            run.log(run.evaluate(run.small))  # what was logged last had other masks


def _check_before(run: Run) -> None:
    """Make sure that there is something to learn from, all through the run."""
    settings = run.settings
    if settings.trains:
        check_learnable(run.model, run.teacher, run.batches, settings)
    schedule = Schedule.for_pruning(settings, run.steps_in(run.batches))
    recovery = schedule.recovery(settings, run.steps_in(run.recovery_batches))
    if settings.metric_for_best_model is not None and not recovery:
        raise SettingsError(
            "metric_for_best_model chooses among the evaluations of the recovery, and there is none: "
            "no epochs are left for it by finetune_epochs and freeze_epochs"
        )
    if settings.method != "one-shot" and settings.repair is True:
        calibration(run.model, run.structure, run.calibration)  # raises where there are too few rows


def train_kept(run: Run) -> None:
    """Train what the masks on the model keep, or all of it: `finetune`."""
    masks = masks_of(run.model)
    plan = Plan.from_values(run.structure, {} if masks is None else dict(masks.items()))
    check_learnable(run.model, run.teacher, run.batches, run.settings)
    if not run.settings.finetune_epochs:
        raise SettingsError("finetune with epochs=0 would train nothing; it takes more than 0, fractions included")
    run.batches = run.recovery_batches
    run.identify(method="finetune")
    if run.saved is not None and Plan.from_dict(run.saved.extra["plan"]).keep != plan.keep:
        raise CheckpointError(f"{run.saved.folder} is of a run with other masks on the model: attach those first")
    run.settle(dense=plan.kept == run.structure.sizes and sizes_of(run.model) is None)
    with run.running():
        if run.saved is None:
            measure_before(run)
        else:
            run.state.extra = dict(run.saved.extra)
        run.use(plan)
        recover(run, max(round(run.settings.finetune_epochs * run.steps_in(run.batches)), 1))


def measure_before(run: Run) -> None:
    """Note what the model scores as it comes."""
    with same_random_state():  # a collator may draw masks
        run.state.extra["scores"] = {} if run.evaluate is None else run.evaluate(run.model)


def _figures(run: Run, scores: dict[str, float]) -> list[Figures]:
    """Return what the model scored, weighed and took before, and what it does now."""
    small, structure = run.small, run.small_structure
    if masks_of(small) is not None:
        small, structure = compacted(run.model, run.structure, run.plan), run.structure.cut(run.plan.kept)
    dense = run.teacher if run.teaches_itself and run.teacher is not None else run.model
    if masks_of(dense) is not None:  # which take time themselves
        dense = compacted(run.model, run.structure, Plan.from_values(run.structure, {}))
    subjects = (Subject(dense, run.structure, run.state.extra.get("scores", {})), Subject(small, structure, scores))
    size, length = run.settings.target_batch_size, run.settings.target_seq_len
    return figures_of(*subjects, batch_size=size, seq_len=length)


def finished(run: Run) -> PruneResult:
    """Return what came of a run, and save its plan."""
    state, masks, target = run.state, masks_of(run.model), run.target
    pruned = target is not None or masks is not None
    if pruned and run.folder is not None and run.accelerator.is_main_process:
        run.plan.save(run.folder / "plan.json")
    best = None if state.best is None else state.best["step"]
    scores = metrics_of(state.history, best)
    dense, small = _figures(run, scores)
    return PruneResult(
        run.model,
        run.plan,
        1 - _kept_share(run) if masks is None else masks.sparsity(),
        1 - _kept_share(run, model_parameters) if masks is None else masks.model_sparsity(),
        scores,
        state.history,
        state.seconds,
        best,
        "" if target is None else run.settings.method,
        run.reason,
        None if target is None else reached(target, run.model, run.structure, run.plan),
        dense=dense,
        pruned=small,
        settings=run.settings,
    )


# One shot.


def start(run: Run, target: Target) -> None:
    """Prune in one shot: all of the way, or as far as gates are to start from; else start with a copy of the model."""
    began = time.perf_counter()
    found = one_shot(run.model, run.structure, run.calibration, run.settings, target, _progress(run))
    run.state.extra["from_one_shot"] = found is not None
    if found is None:
        run.use(Plan.from_values(run.structure, {}))
        return
    run.state.phase, run.state.seconds = "one-shot", time.perf_counter() - began
    small, plan = found
    run.use(plan, small)
    run.log({"sparsity": 1 - run.layers_left, **({} if run.evaluate is None else run.evaluate(run.small))})


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
    masks, origin = attach_to(run.small, run.small_structure), run.state.extra.get("origin")
    learner = GateLearner(masks, target, settings, schedule, layers_left=run.layers_left, origin=origin)
    if run.saved is None and settings.warm_start:
        learner.order(run.small, run.calibration)
    run.state.extra["origin"] = list(learner.origin)
    run.learn_from(fitted=False)
    run.state.begin("prune")
    run.learn(learner)
    run.go_on()
    checks = check_steps(schedule) if learner.shrinks() else []
    modules = [each for each in (run.small, run.objective.projection) if each is not None]
    with frozen(*([] if settings.trains_weights else modules)):
        loop = Loop(run, steps, learner)
        while run.state.step < steps:
            found = learner.long_closed() if run.state.step in checks else None
            if found is not None:
                loop.leave()  # a copy would keep what Accelerate has put on the model
                learner = _shrunk(run, learner, found)
                loop = Loop(run, steps, learner)
            loop.train(next(step for step in (*checks, steps) if step > run.state.step))
    decided = _decided(run, learner)
    if settings.repair is True:
        learner.settle()  # what is reconstructed is the model under its gates
    else:
        learner.masks.set_plan(decided)
    return decided


def _shrunk(run: Run, learner: GateLearner, plan: Plan) -> GateLearner:
    """Go on with what a plan leaves of the small model, the optimiser's moments cut to size.

    :return: the learner itself where the target could not be met from there.
    """
    small = compacted(run.small, run.small_structure, plan)
    masks = attach_to(small, run.small_structure.cut(plan.kept))
    if not can_go_on(masks.structure, learner.target, run.settings):
        return learner
    modules, optimizer, cuts = run.state.modules, run.state.optimizer, learner.cuts(run.small_structure, plan)
    run.cut(plan, small)
    smaller = learner.on(masks, plan, layers_left=run.layers_left)
    run.learn(smaller)
    assert optimizer is not None
    assert run.state.optimizer is not None
    transplant(modules, optimizer, run.state.modules, run.state.optimizer, cuts)
    return smaller


def _decided(run: Run, learner: GateLearner) -> Plan:
    """Return what stays; where that is measured, the first process does."""

    def decide() -> Plan:
        return learner.decide(lambda plan: compacted(run.small, run.small_structure, plan))

    return decide() if learner.target.measure is None else by_first(decide)


# After the decision.


def reconstruct(run: Run, decided: Plan) -> None:
    """Refit what a plan leaves of the small model, by least squares, so that it takes over what is gone.

    What is reproduced is the model under its gates where weights were trained along with them, else the dense one.
    """
    rows = calibration(run.small, run.small_structure, run.calibration)
    small = compacted(run.small, run.small_structure, decided)
    dense, structure, plan = run.small, run.small_structure, decided
    if not run.settings.trains_weights:
        dense, structure, plan = run.model, run.structure, run.plan.then(decided)
    with evaluating(dense, small):
        weights = position_weights(dense, structure, rows, seed=run.settings.seed)
        Reconstruction(dense, structure, small, plan, rows, weights).run()
    run.cut(decided, small)


def recover(run: Run, steps: int) -> None:
    """Train what is left for some optimiser steps."""
    state = run.state
    run.settle(kept_share=_kept_share(run))
    if state.phase != "prune":  # else the loss of the gates, with the projection that it has learned, goes on
        run.learn_from(fitted=True)
    state.begin("finetune" if run.target is None else "recover")
    run.learn()
    state.extra["steps"] = steps
    if run.target is not None:  # go on at the same place of the epoch
        taken = state.extra["taken"] if run.saved is not None else state.batches_seen
        state.extra["taken"], before, run.batches = taken, run.batches, run.recovery_batches
        run.taken = [(before, taken)]
        state.batches_seen = _same_place(run, taken, before)
    run.go_on()
    Loop(run, steps).train()
    if state.best is not None:
        run.small.load_state_dict(state.best["model"])


def _same_place(run: Run, taken: int, before: Batches) -> int:
    """Return how many of the run's batches come before the place of the epoch at which others had been taken."""
    size, now = run.settings.gradient_accumulation_steps, run.batches
    epoch, position = divmod(taken, len(before))
    steps = epoch * run.steps_in(before) + math.ceil(position / size)
    epoch, position = divmod(round(steps * run.steps_in(now) / run.steps_in(before)), run.steps_in(now))
    return epoch * len(now) + min(position * size, len(now))


def _kept_share(run: Run, cost: Callable[[Structure], Cost] = layer_parameters) -> float:
    """Parameters of the small model, by default in its layers, by those of the dense model that it comes from."""
    cut_before = sizes_of(run.model) is not None
    dense = dense_structure(run.model) if cut_before else run.structure
    return cost(run.structure).exact(run.plan.kept) / cost(dense).exact(dense.sizes)

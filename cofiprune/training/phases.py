"""The phases of a run: gates and weights learn together, then what is left recovers, compacted."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, set_seed
from torch import nn

from cofiprune.accounting import layer_parameters
from cofiprune.adapter import structure as structure_of
from cofiprune.batches import ROWS, Batch, Batches, RowBatches
from cofiprune.compaction import compact, restore
from cofiprune.data import prepare
from cofiprune.distillation import hidden_projection, teacher_layers
from cofiprune.errors import CheckpointError, SettingsError, TargetError, TrainingError
from cofiprune.evaluation import evaluate_batches
from cofiprune.masking import attach, masks_of
from cofiprune.masks import MaskRegistry
from cofiprune.oneshot.fisher import measured_importance
from cofiprune.plan import Plan
from cofiprune.record import recorded_sizes
from cofiprune.summary import dense_structure
from cofiprune.table import Table
from cofiprune.target import Target
from cofiprune.tasks import label_names
from cofiprune.training.budget import Choice, choose, chosen_for_epochs
from cofiprune.training.checks import (
    check_callbacks,
    check_learnable,
    check_measurable,
    check_output_dir,
    take_masks_off,
)
from cofiprune.training.compiling import check_compile
from cofiprune.training.config import PruneConfig
from cofiprune.training.gating import Gating
from cofiprune.training.interrupt import Interrupt
from cofiprune.training.loop import Callback, Loop, Session, decay_groups, log, metric_name
from cofiprune.training.objective import TOKEN_AXIS, Objective
from cofiprune.training.probe import measure_pace
from cofiprune.training.progress import Display
from cofiprune.training.projection import cut_projection, fitted_projection, hidden_width
from cofiprune.training.refit import check_rows, refit
from cofiprune.training.result import PruneResult, reached
from cofiprune.training.schedule import Schedule, gate_rate, gated_rates, pruning_rate, rate, recovery_rate
from cofiprune.training.shrinking import Learner, Shut, looks
from cofiprune.training.start import Start, can_go_on, one_shot, start_for
from cofiprune.training.state import RunState, SavedRun, load_checkpoint
from cofiprune.training.teacher import Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class _Finished:
    """Where a phase ended, for the next one to go on from."""

    state: RunState
    projection: nn.Linear | None


class Run:
    """One call of `prune` or `finetune`, with everything checked and set up."""

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None,
        config: PruneConfig,
        train_dataset: Any,
        eval_dataset: Any,
        collator: Callable[[list[Any]], Any] | None,
        compute_metrics: Callable[[Any], dict[str, float]] | None,
        output_dir: str | Path | None,
        callbacks: Sequence[Callback],
        *,
        resume: bool = False,
        teaches_itself: bool = False,
    ) -> None:
        """Check and set up everything; nothing of the models is changed.

        :param teaches_itself: the teacher is a copy of the model as it came, so that checkpoints must hold it.
        """
        self.model = model
        self.teacher = teacher
        self.resume = resume
        self.teaches_itself = teaches_itself
        self.asked: Teacher | None = None
        self.seconds_of_start = 0.0
        self.taken: list[tuple[Batches, int]] = []
        """Batches of a phase that is over, and how many of them were taken."""
        self.reason = ""
        self.config = config
        batches = prepare(
            train_dataset,
            model,
            batch_size=config.batch_size,
            shuffle=True,
            seed=config.seed,
            collator=collator,
            need_labels=teacher is None and config.trains_weights,
            name="train_dataset",
        )
        evaluate = held_out(eval_dataset, model, config, collator, compute_metrics)
        if evaluate is None and config.metric_for_best_model is not None:
            raise SettingsError("metric_for_best_model needs an eval_dataset")
        called = check_callbacks(callbacks)
        folder = check_output_dir(output_dir, resume=resume)
        accelerator = _accelerator(config)
        check_compile(config, accelerator.device)
        set_seed(config.seed, device_specific=True)
        self.calibrated = batches.shard(0, 1)
        self.batches = batches.shard(accelerator.process_index, accelerator.num_processes)
        self.session = Session(
            accelerator,
            config,
            self.batches,
            Display(enabled=config.progress and accelerator.is_main_process),
            Interrupt(),
            called,
            evaluate,
            folder,
        )
        self.trains_embeddings = bool(config.train_embeddings)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.session.accelerator.device
        return device

    def decide(self, target: Target) -> None:
        """Pick a method and epochs by the budget, say so, and go by it.

        :raises SettingsError: when the budget is too small for anything.
        """
        config, folder = self.config, self.session.output_dir
        saved = None if folder is None else folder / "choice.json"
        if self.resume and saved is not None and saved.exists():
            choice = Choice(**json.loads(saved.read_text()))
        elif config.time_budget is None:
            choice = chosen_for_epochs(config.epochs, config.finetune_epochs)
        else:
            steps = Schedule.for_training(1, config, len(self.batches)).total
            pace = measure_pace(self.model, self.teacher, self.batches, steps_per_epoch=steps, target=target.share)
            choice = choose(pace, config.time_budget, share=1 - target.share)
        if saved is not None and self.session.accelerator.is_main_process:
            saved.parent.mkdir(parents=True, exist_ok=True)
            saved.write_text(json.dumps(asdict(choice)))
        settings = {"method": "one-shot", "finetune_epochs": choice.finetune_epochs}
        self.config = self.session.config = config.model_copy(update={**settings, "time_budget": None})
        self.reason = choice.reason
        if config.progress and self.session.accelerator.is_main_process:
            self.session.display.console.print(f"cofiprune picked {choice.reason}", highlight=False, soft_wrap=True)

    def prune(self, target: Target) -> PruneResult:
        """Prune by the configuration's method, and let what is left recover for the epochs that it has for that."""
        structure = structure_of(self.model)
        if self.config.trains:
            cuts_hidden = any(group.kind == "hidden" for group in structure.select(self.config.units))
            check_learnable(self.model, self.teacher, self.batches, self.config, cuts_hidden=cuts_hidden)
        schedule = Schedule.for_pruning(self.config, len(self.batches))
        recovery = Schedule.for_recovery(self.config, schedule, len(self._for_recovery()))
        if self.config.metric_for_best_model is not None and not recovery:
            raise SettingsError(
                "metric_for_best_model chooses among the evaluations of the recovery, and there is none: "
                "no epochs are left for it by finetune_epochs and freeze_epochs"
            )
        if self.config.method != "one-shot" and self.config.repairs:
            check_rows(self.model, self.calibrated)
        saved = self._saved(method="prune", **target.identity())
        with self._running():
            take_masks_off(self.model, quietly=self.resume)
            masks = attach(self.model)
            try:
                plan, state = self._phases(masks, target, saved)
            except Exception:
                masks.detach()
                raise
        plan.check(structure)
        return self._result(plan, masks, state, self.config.method, target)

    def _phases(self, masks: MaskRegistry, target: Target, saved: SavedRun | None) -> tuple[Plan, RunState]:
        done = None
        if saved is not None and saved.phase == "recover":
            plan, recovery = Plan.from_dict(saved.extra["plan"]), int(saved.extra["steps"])
        else:
            if self.config.method == "one-shot":
                schedule = Schedule.for_pruning(self.config, len(self.batches))
                plan, done = self._one_shot(masks, target)
            else:
                plan, done, schedule = self._learn(masks, target, saved)
            recovery = Schedule.for_recovery(self.config, schedule, len(self._for_recovery()))
            saved = None
        if recovery:
            return plan.hard, self._recover(plan, recovery, done, saved, pruned=True).state
        assert done is not None
        masks.set_plan(plan)
        if self.session.evaluate is not None and self.config.method != "one-shot":
            log(self.session, done.state, self.session.evaluate(self.model))  # what was logged last had other masks
        return plan, done.state

    def _one_shot(self, masks: MaskRegistry, target: Target) -> tuple[Plan, _Finished]:
        """Prune on data without training."""
        started = time.perf_counter()
        try:
            found = one_shot(self.model, self.calibrated, self.config, target, self._one_shot_progress())
            left = target.kept_share(structure_of(found.small))
            if target.measure is None and abs(1 - left - target.share) > target.tolerance:
                raise TargetError(f"in one shot, the nearest to {target} is {target.text(left * target.total)}")
        except BaseException:
            masks.detach()  # nothing was changed yet
            raise
        self.seconds_of_start = time.perf_counter() - started
        state = RunState("one-shot", {"model": self.model}, torch.optim.SGD(self.model.parameters()))
        self._log_start(state, found)
        return found.write_back(masks, Plan.from_values(structure_of(found.small), {})), _Finished(state, None)

    def finetune(self) -> PruneResult:
        masks = masks_of(self.model)
        structure = structure_of(self.model)
        plan = Plan.from_values(structure, {} if masks is None else dict(masks.items()))
        cuts_hidden = plan.kept.get("hidden", self.model.config.hidden_size) != self.model.config.hidden_size
        check_learnable(self.model, self.teacher, self.batches, self.config, cuts_hidden=cuts_hidden)
        if not self.config.finetune_epochs:
            raise SettingsError("finetune with epochs=0 would train nothing; it takes more than 0, fractions included")
        if self.config.train_embeddings is None:
            whole = plan.kept == structure.sizes and recorded_sizes(self.model.config) is None
            self.trains_embeddings = whole
        self.batches = self.session.batches = self._for_recovery()
        saved = self._saved(method="finetune")
        if saved is not None and Plan.from_dict(saved.extra["plan"]).keep != plan.keep:
            raise CheckpointError(f"{saved.folder} is of a run with other masks on the model: attach those first")
        schedule = Schedule.for_training(self.config.finetune_epochs, self.config, len(self.batches))
        with self._running():
            done = self._recover(plan, max(schedule.total, 1), None, saved)
        return self._result(plan.hard, masks, done.state, "")

    def _learn(self, masks: MaskRegistry, target: Target, saved: SavedRun | None) -> tuple[Plan, _Finished, Schedule]:
        """The pruning phase: gates and weights learn together; then the plan is decided."""
        try:
            start = self._start(target, saved)
        except BaseException:
            masks.detach()  # nothing was changed yet
            raise
        schedule = Schedule.for_pruning(self.config, len(self.batches), from_one_shot=start is not None)
        if start is None:
            decided, done = self._learn_on(self.model, masks, 1.0, target, schedule, saved, None)
            return self._refitted(self.model, masks, decided, None), done, schedule
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

    def _refitted(self, model: PreTrainedModel, masks: MaskRegistry, decided: Plan, start: Start | None) -> Plan:
        """Refit what a plan leaves of a model, where that is asked for; the scales of the plan are then in its weights.

        What is reproduced is the model as it came where no weights were trained, else the one under its gates.
        """
        if not self.config.repairs:
            return decided
        if not self.config.trains_weights:
            masks.set_plan(Plan.from_values(masks.structure, {}))
        return refit(
            model, masks, decided, self.calibrated,
            whole=None if start is None or self.config.trains_weights else self.model,
            above=None if start is None else start.plan, seed=self.config.seed,
        )  # fmt: skip

    def _start(self, target: Target, saved: SavedRun | None) -> Start | None:
        """What the gates start on: what one shot leaves, or what it left when the run was saved."""
        if saved is not None:
            if "start" not in saved.extra:
                return None
            plan = Plan.from_dict(saved.extra["start"])
            return Start(self.model, compact(self.model, plan), plan)
        started = time.perf_counter()
        progress = self._one_shot_progress()
        found = start_for(self.model, self.calibrated, self.config, target, progress)
        self.seconds_of_start = time.perf_counter() - started
        return found

    def _one_shot_progress(self) -> Callable[[float], None]:
        session = self.session
        session.display.begin("one-shot", total=100, done=0)

        def progress(share: float) -> None:
            session.display.reach(round(100 * share))
            if session.interrupt.requested is not None and session.accelerator.num_processes == 1:
                session.interrupt.stop("Stopped in the one-shot stage: the model is as it was.")

        return progress

    def _learn_on(
        self,
        model: PreTrainedModel,
        masks: MaskRegistry,
        share: float,
        target: Target,
        schedule: Schedule,
        saved: SavedRun | None,
        start: Start | None,
    ) -> tuple[Plan, _Finished]:
        """Learn gates and weights on the model, or on what the start has left of it."""
        config = self.config
        chosen = [group.name for group in masks.structure.present(config.units)]
        gating = Gating(masks, chosen, target, config, schedule, share=share)
        if config.warm_start and saved is None:
            self.batches.set_epoch(0)
            importance = measured_importance(model, masks, chosen, self.batches, seed=config.seed)
            gating.gates.initialise_from(importance, spread=config.warm_start_spread)
        learner = self._learner(model, gating)
        learner.state.extra = {} if start is None else {"start": start.plan.to_dict()}
        if start is not None and saved is None:
            self._log_start(learner.state, start)
        try:
            self._learn_and_shrink(learner, schedule, saved)
            decided = self._decided(learner.gating, learner.model)
            learner.gating.settle()
        finally:
            learner.write_back(model, masks)
        projection = learner.projection
        if projection is not None and "hidden" in decided.keep:
            projection = cut_projection(projection, decided.keep["hidden"])
        plan = decided if learner.plan is None else learner.plan.then(decided)
        return plan, _Finished(learner.state, projection)

    def _learner(self, model: PreTrainedModel, gating: Gating) -> Learner:
        """A model under gates, at the beginning of the phase."""
        shut, projection = Shut(gating.gates), self._projection(model, None)
        return Learner(model, gating, shut, projection, self._learning_state(model, gating, shut, projection))

    def _learning_state(
        self, model: PreTrainedModel, gating: Gating, shut: Shut, projection: nn.Linear | None, **more: nn.Module
    ) -> RunState:
        config = self.config
        groups = self._learning(model, projection) if config.trains_weights else []
        groups += [
            {"params": list(gating.gates.parameters()), "weight_decay": 0.0},
            gating.constraint.ascent_group(gate_rate(config, gating.schedule.gated)),
        ]
        modules = self._modules(model, projection, gates=gating.gates, constraint=gating.constraint, shut=shut, **more)
        return RunState("prune", modules, torch.optim.AdamW(groups, lr=pruning_rate(config, gating.goal.share)))

    def _learn_and_shrink(self, learner: Learner, schedule: Schedule, saved: SavedRun | None) -> None:
        """Run the phase; at each look at the gates, go on with a smaller model where enough has long been shut."""
        config, steps = self.config, schedule.before + schedule.gated

        whole = learner.model

        def with_optimizer(smaller: Learner) -> RunState:
            return self._learning_state(smaller.model, smaller.gating, smaller.shut, smaller.projection, full=whole)

        def begin(saved: SavedRun | None = None) -> Loop:
            trained = len(learner.state.optimizer.param_groups) - 2
            rates = gated_rates(config, schedule, learner.gating.goal.share, trained)
            return self._loop(learner.state, learner.model, learner.projection, rates, steps, learner.gating, saved)

        if saved is not None and "shrunk" in saved.extra:
            learner.shrink(Plan.from_dict(saved.extra["shrunk"]), with_optimizer)
        goal, structure = learner.gating.goal, learner.gating.masks.structure
        shrinks = config.compact_in_training and config.trains_weights and not goal.by_levels(structure)
        pauses = [*(looks(schedule) if shrinks else []), steps]
        with self._frozen(learner.model, learner.projection):
            loop = begin(saved)
            while learner.state.step < steps:
                if learner.state.step in pauses:
                    learner.gating.masks.unbind()
                    learner.shut.look(learner.gating.gates)
                    plan = learner.shut.plan(learner.gating.gates, learner.gating.masks, goal)
                    if plan is not None and can_go_on(compact(learner.model, plan), goal, config):
                        loop.leave()
                        learner.shrink(plan, with_optimizer)
                        loop = begin()
                loop.run(next(step for step in pauses if step > learner.state.step))

    def _decided(self, gating: Gating, model: PreTrainedModel) -> Plan:
        """What stays; where that is measured, the first process does."""
        accelerator = self.session.accelerator
        if accelerator.num_processes == 1 or gating.goal.measure is None:
            return gating.decide(lambda plan: compact(model, plan))
        outcome: list[Any] = [None]
        if accelerator.is_main_process:
            outcome = [gating.decide(lambda plan: compact(model, plan)).to_dict()]
        broadcast_object_list(outcome)
        return Plan.from_dict(outcome[0])

    def _learning(self, model: PreTrainedModel, projection: nn.Linear | None) -> list[dict[str, Any]]:
        """The optimiser's groups of everything that learns but gates."""
        return [
            *decay_groups(model.named_parameters(), self.config.weight_decay),
            *([{"params": list(projection.parameters()), "weight_decay": 0.0}] if projection is not None else []),
        ]

    @contextmanager
    def _frozen(self, model: PreTrainedModel, projection: nn.Linear | None) -> Iterator[None]:
        """Weights do not learn inside, where gates alone do."""
        modules = [] if self.config.trains_weights else [model, *([] if projection is None else [projection])]
        learning = [value for module in modules for value in module.parameters() if value.requires_grad]
        for parameter in learning:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)

    def _log_start(self, state: RunState, start: Start) -> None:
        """Begin the history with what one shot came to."""
        state.seconds = self.seconds_of_start
        measured = {} if self.session.evaluate is None else self.session.evaluate(start.small)
        log(self.session, state, {"phase": "one-shot", "sparsity": 1 - start.share, **measured})

    def _recover(
        self, plan: Plan, steps: int, before: _Finished | None, saved: SavedRun | None, *, pruned: bool = False
    ) -> _Finished:
        """Train what the plan keeps, compacted, and write it back into the full model.

        :param pruned: the full model comes out of the pruning phase, so that its checkpoints must hold it too.
        """
        config = self.config
        small = compact(self.model, plan)
        small.to(self.device)  # type: ignore[arg-type]
        self._freeze_embeddings(small)
        projection = self._projection(small, None if before is None else before.projection, plan)
        groups = self._learning(small, projection)
        modules = self._modules(small, projection, **({"full": self.model} if pruned else {}))
        learning_rate = recovery_rate(config, _kept_share(small))
        state = RunState("recover", modules, torch.optim.AdamW(groups, lr=learning_rate))
        state.extra = {"plan": plan.to_dict(), "steps": steps}
        if before is not None:
            previous = before.state
            state.total_steps, state.batches = previous.total_steps, previous.batches
            state.seconds, state.history = previous.seconds, previous.history
        if pruned:
            self._take_recovery_batches(state, saved)
        warmup = round(config.warmup_ratio * steps)

        def rates(step: int) -> list[float]:
            factor = rate(config.finetune_lr_scheduler_type, step, steps, warmup)
            return [learning_rate * factor] * len(groups)

        loop = self._loop(state, small, projection, rates, steps, None, saved)
        try:
            loop.run()
            if state.best is not None:
                small.load_state_dict(state.best["model"])
        except TrainingError:
            self._set_masks(plan)  # the model stays as it was before the recovery, scales included
            raise
        except BaseException:
            self._write_back(small, plan)
            raise
        self._write_back(small, plan)
        return _Finished(state, projection)

    def _for_recovery(self) -> Batches:
        """The batches of the recovery, which may have another size."""
        size = self.config.finetune_batch_size
        return self.batches.resized(size) if size and isinstance(self.batches, RowBatches) else self.batches

    def _take_recovery_batches(self, state: RunState, saved: SavedRun | None) -> None:
        """Go on with the batches of the recovery, at the same place of the epoch."""
        taken = state.batches if saved is None else saved.extra["pruned"]
        state.extra["pruned"] = taken
        self.taken = [(self.batches, taken)]
        part = self._for_recovery()
        state.batches = round(taken * len(part) / len(self.batches))
        self.batches = self.session.batches = part

    def _write_back(self, small: PreTrainedModel, plan: Plan) -> None:
        """Bring what was trained into the full model."""
        restore(self.model, small, plan)
        self._set_masks(plan.hard)

    def _set_masks(self, plan: Plan) -> None:
        masks = masks_of(self.model)
        if masks is not None:
            masks.set_plan(plan)

    def _modules(self, model: nn.Module, projection: nn.Linear | None, **more: nn.Module) -> dict[str, nn.Module]:
        """What a checkpoint holds the tensors of."""
        modules = {"model": model, **more}
        if projection is not None:
            modules["projection"] = projection
        if self.teaches_itself and self.teacher is not None:
            modules["teacher"] = self.teacher
        return modules

    def _loop(
        self,
        state: RunState,
        model: PreTrainedModel,
        projection: nn.Linear | None,
        rates: Callable[[int], list[float]],
        steps: int,
        gating: Gating | None,
        saved: SavedRun | None,
    ) -> Loop:
        """Set up a phase, from its beginning or from where it was saved."""
        objective = Objective(
            model, self._asked(projection), projection, self.batches.task, self.config, labelled=self.batches.labelled
        )
        state.scaler = self.session.accelerator.scaler
        if saved is not None:
            state.restore(saved.captured)
            self._remember(state)
            saved.restore_rng(self.session.accelerator.process_index)
        return Loop(self.session, state, objective, total=steps, rates=rates, gating=gating)

    def _asked(self, projection: nn.Linear | None) -> Teacher | None:
        """The teacher with its memory, the same in all phases."""
        if self.teacher is None:
            return None
        if self.asked is None:
            layers = (
                ()
                if projection is None
                else teacher_layers(self.teacher.config.num_hidden_layers, self.config.distill_layers)
            )
            memory = 0
            if isinstance(self.batches, RowBatches) and isinstance(self.batches.rows, Table):
                memory = self.config.teacher_memory_mb * 2**20 if self.batches.task != "other" else 0
                for batches in (self.batches, *(batches for batches, _ in self.taken)):
                    batches.with_rows = memory > 0  # type: ignore[attr-defined]
            token_axis = self.batches.task in TOKEN_AXIS
            self.asked = Teacher(self.teacher, layers, token_axis=token_axis, memory=memory)
        return self.asked

    def _remember(self, state: RunState) -> None:
        """Fill the teacher's memory as it was: its answers depend, in the last digits, on what they were padded to."""
        teacher = self.asked
        if teacher is None or not isinstance(self.batches, RowBatches) or not self.batches.with_rows:
            return
        labels = {ROWS, *label_names(self.model)}
        for batches, count in (*self.taken, (self.batches, state.batches)):
            for batch in _first(batches, count):
                if not teacher.knows(batch[ROWS]):
                    inputs = {name: value.to(self.device) for name, value in batch.items() if name not in labels}
                    with self.session.accelerator.autocast():
                        teacher.answer(inputs, batch[ROWS])

    def _projection(
        self, model: PreTrainedModel, learned: nn.Linear | None, plan: Plan | None = None
    ) -> nn.Linear | None:
        """The map for the layers' distillation; None where nothing is distilled."""
        if self.teacher is None or not self.config.distill_layers_weight:
            return None
        if learned is not None and plan is not None:
            return learned
        width, wanted = hidden_width(model), hidden_width(self.teacher)
        same_depth = model.config.num_hidden_layers == self.teacher.config.num_hidden_layers
        if plan is None and width == wanted and same_depth:
            return hidden_projection(width, wanted).to(self.device)
        self.batches.set_epoch(0)
        self.batches.skip(0)
        return fitted_projection(model, self.teacher, self.batches, self.device)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Models on the device, embeddings frozen if asked, signals caught; everything put back afterwards."""
        models: list[nn.Module] = [self.model, *([] if self.teacher is None else [self.teacher])]
        modes = [(module, module.training) for model in models for module in model.modules()]
        for model in models:
            model.to(self.device)
        if self.teacher is not None:
            self.teacher.train(False)
        frozen: list[nn.Parameter] = []
        try:
            metric = self.config.metric_for_best_model
            if metric is not None and self.session.evaluate is not None:
                metric_name(metric, self.session.evaluate(self.model))
            frozen = self._freeze_embeddings(self.model)
            with self.session.display, self.session.interrupt:
                yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
            for module, mode in modes:
                module.training = mode

    def _freeze_embeddings(self, model: PreTrainedModel) -> list[nn.Parameter]:
        if self.trains_embeddings:
            return []
        tables = set(structure_of(model).embeddings)
        frozen = [p for name, p in model.named_parameters() if name in tables and p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        return frozen

    def _saved(self, **identity: Any) -> SavedRun | None:
        """Remember what identifies this run; the checkpoint to resume from, when asked for one."""
        kept = self.config.model_dump(exclude={"progress", "logging_steps", "eval_steps", "checkpoint_steps"})
        structure = structure_of(self.model)
        self.session.fingerprint = {
            **identity,
            "family": structure.family,
            "sizes": sum(structure.sizes.values()),
            "batches": len(self.batches),
            "processes": self.session.accelerator.num_processes,
            "teacher": None if self.teacher is None else "self" if self.teaches_itself else type(self.teacher).__name__,
            "config": {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()},
        }
        if not self.resume or self.session.output_dir is None:
            return None
        return load_checkpoint(self.session.output_dir, self.session.fingerprint)

    def _result(
        self, plan: Plan, masks: MaskRegistry | None, state: RunState, method: str, target: Target | None = None
    ) -> PruneResult:
        evaluated = [entry for entry in state.history if any(name.startswith("eval_") for name in entry)]
        if state.best is not None:
            evaluated = [entry for entry in evaluated if entry["step"] == state.best["step"]]
        last = evaluated[-1] if evaluated else {}
        metrics = {name: value for name, value in last.items() if name.startswith("eval_")}
        if self.session.output_dir is not None and self.session.accelerator.is_main_process:
            plan.save(self.session.output_dir / "plan.json")
        return PruneResult(
            self.model,
            plan,
            masks.sparsity() if masks is not None else 0.0,
            masks.model_sparsity() if masks is not None else 0.0,
            metrics,
            state.history,
            state.seconds,
            state.best["step"] if state.best is not None else None,
            method,
            self.reason,
            None if target is None else reached(target, self.model, plan),
        )


def _first(batches: Batches, count: int) -> Iterator[Batch]:
    """The batches that were taken first, over all epochs."""
    for epoch in range(-(-count // len(batches))):
        batches.set_epoch(epoch)
        batches.skip(0)
        yield from itertools.islice(batches, count - epoch * len(batches))


def _kept_share(model: PreTrainedModel) -> float:
    """Parameters of a model's layers by those of the dense model that it comes from."""
    ours, whole = structure_of(model), dense_structure(model)
    return layer_parameters(ours).exact(ours.sizes) / layer_parameters(whole).exact(whole.sizes)


def held_out(
    eval_dataset: Any,
    model: PreTrainedModel,
    config: PruneConfig,
    collator: Callable[[list[Any]], Any] | None,
    compute_metrics: Callable[[Any], dict[str, float]] | None,
) -> Callable[[nn.Module], dict[str, float]] | None:
    """Return what evaluates a model on a checked evaluation set; None without one."""
    if eval_dataset is None:
        return None
    batches = prepare(
        eval_dataset,
        model,
        batch_size=config.eval_batch_size,
        collator=collator,
        need_labels=False,
        name="eval_dataset",
    )
    check_measurable(batches, model, computed=compute_metrics is not None)
    return lambda trained: _prefixed(
        evaluate_batches(trained, batches, compute_metrics=compute_metrics)  # type: ignore[arg-type]
    )


def _accelerator(config: PruneConfig) -> Accelerator:
    """Set up Accelerate; a later run of the same process may ask for another precision than an earlier one."""
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != config.mixed_precision:
        AcceleratorState._reset_state()
    # Which parts of a model a batch uses depends on its head (an unused pooler, say).
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise SettingsError("mixed_precision='fp16' needs a GPU; use 'bf16' or 'no' here")
    return Accelerator(mixed_precision=config.mixed_precision, kwargs_handlers=[unused])


def _prefixed(metrics: dict[str, float]) -> dict[str, float]:
    return {name if name.startswith("eval_") else f"eval_{name}": value for name, value in metrics.items()}

"""One call of `prune` or `finetune`: what is checked and set up for it, and its phases in their order."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import set_seed

from cofiprune.adapter import structure as structure_of
from cofiprune.data.batches import Batches, RowBatches
from cofiprune.data.checks import longest_sequence
from cofiprune.data.prepare import prepare
from cofiprune.errors import CheckpointError, SettingsError
from cofiprune.masking import attach, masks_of
from cofiprune.masks import MaskRegistry
from cofiprune.plan import Plan
from cofiprune.record import recorded_sizes
from cofiprune.selection.target import Target
from cofiprune.training.budget import Choice, choose, chosen_for_epochs
from cofiprune.training.checks import check_callbacks, check_learnable, check_output_dir, take_masks_off
from cofiprune.training.compiling import check_compile
from cofiprune.training.config import PruneConfig
from cofiprune.training.gated import GatedPhase
from cofiprune.training.interrupt import Interrupt
from cofiprune.training.loop import Callback, Session, log
from cofiprune.training.opening import Opening
from cofiprune.training.preparation import accelerator_for, held_out, padding_multiple
from cofiprune.training.probe import measure_pace
from cofiprune.training.progress import Display
from cofiprune.training.recovery import Recovery
from cofiprune.training.refit import check_rows
from cofiprune.training.result import PruneResult, reached
from cofiprune.training.schedule import Schedule
from cofiprune.training.stage import Stage
from cofiprune.training.state import RunState, SavedRun, load_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        self.reason = ""
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
        accelerator = accelerator_for(config)
        check_compile(config, accelerator.device)
        if isinstance(batches, RowBatches):
            batches.pad_to(padding_multiple(config, model, accelerator.device), longest_sequence(model))
        set_seed(config.seed, device_specific=True)
        self.session = Session(
            accelerator,
            config,
            batches.shard(accelerator.process_index, accelerator.num_processes),
            Display(enabled=config.progress and accelerator.is_main_process),
            Interrupt(),
            called,
            evaluate,
            folder,
        )
        self.stage = Stage(model, teacher, self.session, batches.shard(0, 1), teaches_itself=teaches_itself)

    @property
    def config(self) -> PruneConfig:
        return self.session.config

    @property
    def batches(self) -> Batches:
        return self.stage.batches

    def decide(self, target: Target) -> None:
        """Pick a method and epochs by the budget, say so, and go by it.

        :raises SettingsError: when the budget is too small for anything.
        """
        config, folder = self.config, self.session.output_dir
        saved = None if folder is None else folder / "choice.json"
        if self.resume and saved is not None and saved.exists():
            choice = Choice(**json.loads(saved.read_text()))
        elif config.time_budget is None:
            choice = chosen_for_epochs(config.pruning_epochs, config.recovery_epochs)
        else:
            steps = Schedule.for_training(1, config, len(self.batches)).total
            pace = measure_pace(self.model, self.teacher, self.batches, steps_per_epoch=steps, target=target.share)
            choice = choose(pace, config.time_budget, share=1 - target.share)
        if saved is not None and self.session.accelerator.is_main_process:
            saved.parent.mkdir(parents=True, exist_ok=True)
            saved.write_text(json.dumps(asdict(choice)))
        settings = {"method": "one-shot", "finetune_epochs": choice.finetune_epochs}
        self.session.config = config.model_copy(update={**settings, "time_budget": None})
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
        recovery = Schedule.for_recovery(self.config, schedule, len(self.stage.for_recovery()))
        if self.config.metric_for_best_model is not None and not recovery:
            raise SettingsError(
                "metric_for_best_model chooses among the evaluations of the recovery, and there is none: "
                "no epochs are left for it by finetune_epochs and freeze_epochs"
            )
        if self.config.method != "one-shot" and self.config.repairs:
            check_rows(self.model, self.stage.calibrated)
        saved = self._saved(method="prune", **target.identity())
        with self.stage.running():
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
        done, opening = None, Opening(self.stage)
        if saved is not None and saved.phase == "recover":
            plan, recovery = Plan.from_dict(saved.extra["plan"]), int(saved.extra["steps"])
        else:
            if self.config.method == "one-shot":
                schedule = Schedule.for_pruning(self.config, len(self.batches))
                plan, done = opening.decide(masks, target)
            else:
                plan, done, schedule = GatedPhase(self.stage, opening).run(masks, target, saved)
            recovery = Schedule.for_recovery(self.config, schedule, len(self.stage.for_recovery()))
            saved = None
        if recovery:
            return plan.hard, Recovery(self.stage).run(plan, recovery, done, saved, pruned=True).state
        assert done is not None
        masks.set_plan(plan)
        if self.session.evaluate is not None and self.config.method != "one-shot":
            log(self.session, done.state, self.session.evaluate(self.model))  # what was logged last had other masks
        return plan, done.state

    def finetune(self) -> PruneResult:
        masks = masks_of(self.model)
        structure = structure_of(self.model)
        plan = Plan.from_values(structure, {} if masks is None else dict(masks.items()))
        cuts_hidden = plan.kept.get("hidden", self.model.config.hidden_size) != self.model.config.hidden_size
        check_learnable(self.model, self.teacher, self.batches, self.config, cuts_hidden=cuts_hidden)
        epochs = 2.0 if self.config.finetune_epochs is None else self.config.finetune_epochs
        if not epochs:
            raise SettingsError("finetune with epochs=0 would train nothing; it takes more than 0, fractions included")
        if self.config.train_embeddings is None:
            whole = plan.kept == structure.sizes and recorded_sizes(self.model.config) is None
            self.stage.trains_embeddings = whole
        self.stage.use(self.stage.for_recovery())
        saved = self._saved(method="finetune")
        if saved is not None and Plan.from_dict(saved.extra["plan"]).keep != plan.keep:
            raise CheckpointError(f"{saved.folder} is of a run with other masks on the model: attach those first")
        schedule = Schedule.for_training(epochs, self.config, len(self.batches))
        with self.stage.running():
            done = Recovery(self.stage).run(plan, max(schedule.total, 1), None, saved)
        return self._result(plan.hard, masks, done.state, "")

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
            "teacher": None
            if self.teacher is None
            else "self"
            if self.stage.teaches_itself
            else type(self.teacher).__name__,
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
            self.session.output_dir.mkdir(parents=True, exist_ok=True)  # one shot writes no checkpoint
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

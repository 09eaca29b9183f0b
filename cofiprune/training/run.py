"""One call of `prune` or `finetune`: what it was asked for, what is set up for it, and where it stands.

What learns is always a compacted copy, `small`: of all of the model at first, and of what its plan keeps as soon as
something is decided. The model itself is written to once, when the run ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from cofiprune.accounting import layer_parameters, sparsity
from cofiprune.compaction.slicing import compacted, write_back
from cofiprune.data.batches import Batches, RowBatches
from cofiprune.data.checks import longest_sequence
from cofiprune.data.prepare import cached_in, prepare
from cofiprune.data.streams import StreamBatches
from cofiprune.errors import SettingsError, StorageError, TrainingError
from cofiprune.hooks import evaluating
from cofiprune.masking import attach_to, masks_of
from cofiprune.plan import Plan
from cofiprune.selection.target import Target
from cofiprune.structure import Structure
from cofiprune.training.arguments import take_masks_off
from cofiprune.training.checkpoint import Resume, SavedRun, begun_with, has_checkpoints, load_checkpoint, note_stop
from cofiprune.training.config import PruneConfig
from cofiprune.training.environment import (
    Display,
    Evaluate,
    Interrupt,
    accelerator_for,
    check_callbacks,
    check_compile,
    check_output_dir,
    held_out,
    metric_name,
)
from cofiprune.training.identity import digest_of_data, digest_of_model, digest_of_rows, identity
from cofiprune.training.learner import GateLearner
from cofiprune.training.objective import Objective
from cofiprune.training.processes import noticing, together
from cofiprune.training.resolved import Facts, ResolvedSettings, resolve, unit_kinds
from cofiprune.training.state import RunState

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Callback = Callable[[dict[str, Any]], None]


@dataclass
class Run:
    """A call of `prune` or `finetune`; phases are functions that take it one step further."""

    model: PreTrainedModel
    structure: Structure
    config: PruneConfig
    target: Target | None
    """None for `finetune`."""
    teacher: PreTrainedModel | None
    teaches_itself: bool
    """The teacher is a copy of the model as it came."""
    train_dataset: Any
    eval_dataset: Any
    collator: Callable[[list[Any]], Any] | None
    compute_metrics: Callable[[Any], dict[str, float]] | None
    output_dir: str | Path | None
    callbacks: Sequence[Callback]
    resume: Resume
    reason: str = ""
    """Of the choice that method="auto" made."""

    # Set up by `prepare`.
    batches: Batches = field(init=False)
    """Of the present phase and this process."""
    calibration: Batches = field(init=False)
    """All rows, the same batches whatever processes share them."""
    evaluate: Evaluate | None = field(init=False, default=None)
    folder: Path | None = field(init=False, default=None)
    accelerator: Accelerator = field(init=False)
    display: Display = field(init=False)
    interrupt: Interrupt = field(init=False)
    facts: Facts = field(init=False)
    settings: ResolvedSettings = field(init=False)
    """The configuration with a value for everything that it leaves open, from the facts that are known by now."""
    fingerprint: dict[str, Any] = field(init=False)
    saved: SavedRun | None = field(init=False, default=None)
    """The checkpoint from which the next phase goes on."""

    # Where it stands.
    small: PreTrainedModel = field(init=False)
    """The model that is trained; the one that was handed in only before there is a copy."""
    plan: Plan = field(init=False)
    """What `small` keeps of the model, hard; at the end with the scales of the masks."""
    objective: Objective = field(init=False)
    state: RunState = field(init=False, default_factory=RunState)
    taken: list[tuple[Batches, int]] = field(init=False, default_factory=list)
    """Batches of a phase that is over, and how many of them were taken."""
    small_structure: Structure = field(init=False)

    def prepare(self) -> None:
        """Check the data and the settings, and set everything up; nothing of the models is changed."""
        config, taught = self.config, self.teacher is not None or bool(cached_in(self.train_dataset))
        batches = prepare(
            self.train_dataset,
            self.model,
            batch_size=config.batch_size,
            shuffle=True,
            seed=config.seed,
            collator=self.collator,
            need_labels=not taught and config.trains_weights,
            name="train_dataset",
        )
        batches.taught = taught and self.teacher is None
        self.evaluate = held_out(self.model, self.eval_dataset, config, self.collator, self.compute_metrics)
        if self.evaluate is None and config.metric_for_best_model is not None:
            raise SettingsError("metric_for_best_model needs an eval_dataset")
        self.callbacks = check_callbacks(self.callbacks)
        self.folder = check_output_dir(self.output_dir, resume=self.resume)
        if self.resume == "auto":
            self.resume = self.folder is not None and has_checkpoints(self.folder)
        self.accelerator = accelerator_for(config)
        check_compile(config, self.accelerator.device)
        set_seed(config.seed, device_specific=True)
        if isinstance(batches, RowBatches | StreamBatches):
            batches.accumulated = config.gradient_accumulation_steps
        if isinstance(batches, StreamBatches):
            batches.steps = config.steps_of_epoch(gated=self.target is not None)
        self.batches = batches.shard(self.accelerator.process_index, self.accelerator.num_processes)
        if config.max_steps is not None:
            steps = self.steps_in(self._of_size(config.finetune_batch_size if self._recovers_only else None))
            self.config = config.for_steps(steps, gated=self.target is not None)
        self.calibration = self.batches.whole()
        self.display = Display(enabled=config.progress and self.accelerator.is_main_process)
        self.interrupt = Interrupt()
        self.small, self.small_structure = self.model, self.structure
        self.plan = Plan.from_values(self.structure, {})
        checkpointing = any(getattr(each, "gradient_checkpointing", False) is True for each in self.model.modules())
        half = config.mixed_precision != "no" or self.model.dtype.itemsize == 2
        self.facts = Facts(
            self.steps_in(self.batches),
            None if self.target is None else self.target.share,
            units=unit_kinds(self.structure),
            taught=taught,
            labelled=batches.labelled,
            round_to=1 if self.target is None else self.target.round_to,
            needs_train_mode=checkpointing,
            in_16_bit_on_gpu=half and self.accelerator.device.type == "cuda",
        )
        self.settle()

    def settle(self, **facts: Any) -> None:
        """Give the settings that are left open their values.

        :param facts: what is known since the last time.
        """
        self.facts = replace(self.facts, **facts)
        self.settings = resolve(self.config, self.facts)
        for batches in (self.batches, self.calibration):
            if isinstance(batches, RowBatches):
                batches.pad_to(self.settings.pad_to_multiple_of, longest_sequence(self.model))

    def steps_in(self, batches: Batches) -> int:
        """Optimiser steps of an epoch."""
        return math.ceil(len(batches) / self.config.gradient_accumulation_steps)

    @property
    def recovery_batches(self) -> Batches:
        """The batches of the recovery, which may have another size than the present ones."""
        return self._of_size(self.settings.finetune_batch_size)

    def _of_size(self, size: int | None) -> Batches:
        changes = size is not None and isinstance(self.batches, RowBatches)
        return replace(self.batches, batch_size=size) if changes else self.batches  # type: ignore[call-arg]

    @property
    def _recovers_only(self) -> bool:
        """All training is with the batches of the recovery."""
        return self.target is None or self.config.decides_in_one_shot

    def identify(self, **more: Any) -> None:
        """Note what a resumed run must have in common with this one, and find the checkpoint to resume from."""
        if self.folder is None:
            return
        own = identity(self.model, "self" if self.teaches_itself else self.teacher, self.settings)
        self.fingerprint = {
            **more,
            "teacher": own["teacher"],  # first: settings that are left open follow from it
            **own,
            "rows": digest_of_rows(self.calibration),
            # What is best depends on the rows that it is chosen by.
            "eval_rows": digest_of_data(self.eval_dataset) if self.config.metric_for_best_model else "",
            "batches": len(self.batches),
            "processes": self.accelerator.num_processes,
        }
        if self.resume:
            self.fingerprint["model"] = begun_with(self.folder, self.fingerprint["model"])
            self.saved = load_checkpoint(self.folder, self.fingerprint)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Have the models on the device and signals caught; at the end, write to the model what came of the run."""
        teachers = [] if self.teacher is None else [self.teacher]
        for model in (self.model, *teachers):
            model.to(self.accelerator.device)
        with evaluating(*teachers), self.display, self.interrupt:
            metric = self.config.metric_for_best_model
            if metric is not None and self.evaluate is not None:
                metric_name(metric, self.evaluate(self.model))
            if self.target is not None:
                take_masks_off(self.model, quietly=bool(self.resume), stacklevel=6)
            try:
                with noticing(self.folder):
                    yield
            except BaseException as error:
                # Whoever stops a run finds what it has trained. After an error, what was pruned would lack the plan
                # that belongs to it, and after a loss that is not a number the weights are worth nothing.
                lost = isinstance(error, Exception if self.target is not None else TrainingError)
                if isinstance(error, StorageError) or not lost:
                    self._write()
                    if self.folder is not None and self.accelerator.is_main_process:
                        note_stop(self.folder, self.fingerprint["model"], digest_of_model(self.model))
                raise
            self._write()

    def _write(self) -> None:
        """Bring the small model's weights into the model, and what is kept of it onto its masks."""
        if self.small is self.model:
            return  # nothing was begun yet
        write_back(self.model, self.structure, self.small, self.plan)
        inner = masks_of(self.small)
        if inner is not None:
            self.plan = self.plan.then(Plan.from_masks(inner))
        masks = masks_of(self.model)
        if masks is None and self.target is not None:
            masks = attach_to(self.model, self.structure)
        if masks is not None:
            masks.set_plan(self.plan)

    def use(self, plan: Plan, small: PreTrainedModel | None = None) -> None:
        """Go on with what a plan leaves of the model, its scales in the weights.

        :param small: that, where it is made already.
        """
        small = compacted(self.model, self.structure, plan) if small is None else small
        small.to(self.accelerator.device)
        if not self.settings.train_embeddings:
            for name, parameter in small.named_parameters():
                if name in self.structure.embeddings:
                    parameter.requires_grad_(False)
        self.small, self.plan, self.small_structure = small, plan.hard, self.structure.cut(plan.kept)
        self.state.extra["plan"] = self.plan.to_dict()

    def cut(self, plan: Plan, small: PreTrainedModel | None = None) -> None:
        """Go on with what a plan for the present small model leaves of it.

        :param small: that, where it is made already.
        """
        small = compacted(self.small, self.small_structure, plan) if small is None else small
        if "hidden" in plan.keep and hasattr(self, "objective"):
            self.objective.cut(plan.keep["hidden"])
        self.use(self.plan.then(plan), small)

    @property
    def layers_left(self) -> float:
        """Parameters in the layers of the small model by those of the model, in [0, 1]."""
        return 1 - sparsity(layer_parameters(self.structure), self.structure, self.plan.kept)

    def learn_from(self, *, fitted: bool) -> None:
        """Set up the loss for the small model and the batches of the phase.

        :param fitted: see `Objective`.
        """
        memory = 0
        if self.teacher is not None and isinstance(self.batches, RowBatches) and self.batches.in_memory:
            # Only rows that are in memory are the same every time; they are known by their numbers.
            memory = self.settings.teacher_memory_mb * 2**20 if self.batches.task != "other" else 0
            for batches in (self.batches, *(batches for batches, _ in self.taken)):
                assert isinstance(batches, RowBatches)
                batches.with_rows = memory > 0
        rows = self.batches.whole()
        self.objective = Objective(self.small, self.teacher, rows, self.settings, fitted=fitted, memory=memory)

    def learn(self, learner: GateLearner | None = None) -> None:
        """Let an optimiser step what learns from now on: weights, the projection and, where there are some, gates."""
        projection, groups = self.objective.projection, []
        modules: dict[str, nn.Module] = {"model": self.small}
        if learner is None or self.settings.trains_weights:
            trained = [parameter for parameter in self.small.parameters() if parameter.requires_grad]
            groups += [
                {"params": [each for each in trained if each.dim() > 1], "weight_decay": self.settings.weight_decay},
                {"params": [each for each in trained if each.dim() <= 1], "weight_decay": 0.0},
            ]
            if projection is not None:
                groups.append({"params": list(projection.parameters()), "weight_decay": 0.0})
        if learner is not None:
            groups += learner.groups()
            modules["gates"] = learner
        if projection is not None:
            modules["projection"] = projection
        # Whoever resumes may hand in the model of the run that was stopped, which is no longer what it was.
        dense = self.teacher if self.teaches_itself else self.model if self.target is not None else None
        if dense is not None:
            modules["dense"] = dense
        self.state.modules, self.state.optimizer = modules, torch.optim.AdamW(groups)
        self.state.scaler = self.accelerator.scaler

    def go_on(self) -> None:
        """Take up what was saved of the phase that has begun, if anything was."""
        saved, self.saved = self.saved, None
        if saved is None:
            return
        self.state.restore(saved.captured)
        if self.target is not None and self.teacher is not None and self.teaches_itself:
            self.model.load_state_dict(self.teacher.state_dict())
        with self.accelerator.autocast():
            for batches, count in (*self.taken, (self.batches, self.state.batches_seen)):
                self.objective.remember(self.small, batches, count)
        saved.restore_rng(self.accelerator.process_index)

    def log(self, values: Mapping[str, Any]) -> None:
        """Add an entry to the history, show it and hand it to the callbacks."""
        entry = {
            "phase": self.state.phase,
            "step": self.state.total_steps,
            "epoch": round(self.state.batches_seen / len(self.batches), 4),
            "seconds": round(self.state.seconds, 3),
            **values,
        }
        self.state.history.append(entry)
        self.display.show(entry)
        with together():
            for callback in self.callbacks if self.accelerator.is_main_process else ():
                callback(dict(entry))

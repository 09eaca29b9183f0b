"""The loop of one phase: batches in, optimiser steps out, on Accelerate."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Literal, NoReturn

import torch
from torch import Tensor, nn

from cofiprune.data.batches import REPEATED, ROWS, Batch, to_model
from cofiprune.errors import TrainingError
from cofiprune.hooks import same_random_state
from cofiprune.training.arguments import check_weights
from cofiprune.training.checkpoint import has_checkpoints, save_checkpoint
from cofiprune.training.environment import metric_name
from cofiprune.training.learner import GateLearner, average_gradients, start_alike
from cofiprune.training.objective import Agree, over_processes
from cofiprune.training.processes import averaged, shares_of, together
from cofiprune.training.resolved import pruning_rates, recovery_rates

if TYPE_CHECKING:
    from cofiprune.training.run import Run

_ASK_OTHERS = 10
"""Steps after which processes ask one another whether to stop."""


class Loop:
    """Trains the run's small model from wherever its state stands to the last step of a phase."""

    def __init__(self, run: Run, steps: int, learner: GateLearner | None = None) -> None:
        """Set up a phase.

        :param run: its state has the modules of the phase, and an optimiser of all that learns.
        :param steps: optimiser steps of the phase.
        """
        self.run = run
        self.state = run.state
        self.total = steps
        self.learner = learner
        assert self.state.optimizer is not None
        groups = len(self.state.optimizer.param_groups)
        self.rates = (
            recovery_rates(run.settings, steps, groups)
            if learner is None
            else pruning_rates(run.settings, learner.schedule, groups - len(learner.groups()))
        )
        accelerator = run.accelerator
        # Alone, the model is used as it is: `prepare_model` would replace its forward for mixed precision, which
        # the autocast around each step does as well, and copies of the model would keep the replacement.
        several = accelerator.num_processes > 1
        self.model: nn.Module = accelerator.prepare_model(run.small) if several else run.small
        if run.settings.torch_compile:
            # Gates and masks are read by the compiled forward pass as tensors from outside, so that a new sample of
            # the gates in every step compiles nothing anew. A new length of sequence does so once, for all lengths.
            self.model = torch.compile(self.model, backend=run.settings.torch_compile_backend)  # type: ignore[assignment]
        self.optimizer = accelerator.prepare_optimizer(self.state.optimizer)
        self.last_saved = self.state.total_steps
        others = [module for module in (learner, run.objective.projection) if module is not None]
        self.others = [parameter for module in others for parameter in module.parameters()]
        start_alike(self.others)
        self.heard = self.state.step > 0 or not run.objective.label_weight
        """Whether any label has counted since the phase began."""

    def train(self, until: int | None = None) -> None:
        """Train to the end of the phase, or to a step of it, to go on later.

        :raises TrainingError: when the loss is not a number.
        :raises KeyboardInterrupt: on Ctrl-C, after a checkpoint has been written.
        """
        paused = False
        try:
            self._train(self.total if until is None else until)
            paused = self.state.step < self.total
        finally:
            if not paused:
                self.leave()

    def _train(self, until: int) -> None:
        state, run = self.state, self.run
        run.display.begin(state.phase, total=self.total, done=state.step)
        started = time.perf_counter() - state.seconds
        groups = self._groups()
        while state.step < until:
            self.model.train(run.settings.dropout)
            parts = self._step(next(groups))
            state.step += 1
            state.total_steps += 1
            state.seconds = time.perf_counter() - started
            run.display.reach(state.step)
            self._check_heard()
            self._record(parts)
            if self._due(run.settings.eval_steps) and run.evaluate is not None:
                self._evaluate(run.evaluate)
            if run.folder is not None and self._due(run.settings.checkpoint_steps):
                self.save()
            if self._interrupted():
                self._stop()

    def _groups(self) -> Iterator[list[Batch]]:
        """Give the batches of one optimiser step at a time, from the state's position on, epoch after epoch."""
        batches, size = self.run.batches, self.run.settings.gradient_accumulation_steps
        while True:
            epoch, done = divmod(self.state.batches_seen, len(batches))
            given = batches.epoch(epoch, done)
            while done < len(batches):
                with together():
                    group = list(itertools.islice(given, min(size, len(batches) - done)))
                done += len(group)
                self.state.batches_seen += len(group)
                yield group

    def _step(self, group: Sequence[Batch]) -> dict[str, Tensor]:
        run, accelerator, step = self.run, self.run.accelerator, self.state.step
        for target, rate in zip(self.optimizer.param_groups, self.rates(step), strict=True):
            target["lr"] = rate
        learner = self._active(step)
        parts: dict[str, Tensor] = {}
        several = len(group) * accelerator.num_processes > 1
        shares = shares_of([run.objective.counts(batch) for batch in group]) if several else [None]
        self.heard = self.heard or any(run.objective.counts(batch)["label_loss"] > 0 for batch in group)
        agree = self._agreement(group, shares, learner)
        for index, batch in enumerate(group):
            on_device = self._on_device(batch)
            last = index == len(group) - 1
            if learner is not None:
                learner.bind(step)
            with nullcontext() if last else accelerator.no_sync(self.model), accelerator.autocast():
                alive = None if learner is None else learner.alive_layers()
                found = run.objective(self.model, on_device, alive, shares[index], agree)
                if learner is not None and last:
                    found["constraint"] = learner.penalty(step)
                loss = found["loss"] + found.get("constraint", 0.0)
            accelerator.backward(loss)
            for name, value in found.items():
                parts[name] = parts.get(name, 0) + value.detach()
        at_once = parts["loss"].device.type == "cpu" and accelerator.num_processes == 1
        if at_once and not math.isfinite(float(parts["loss"])):
            # Looking is free here. On other devices it would wait for every step, and so would other processes; they
            # look before anything is kept.
            self.optimizer.zero_grad(set_to_none=True)
            self._not_a_number(step=self.state.total_steps + 1)
        self._update(learner)
        return parts

    def _agreement(
        self, group: Sequence[Batch], shares: Sequence[Mapping[str, float] | None], learner: GateLearner | None
    ) -> Agree:
        """How the batches of a step agree on the student's layers: by the errors of all rows, as one larger batch does.

        Where there are several, that is known after a pass over them; the passes to learn from draw the same numbers.
        """
        if len(group) == 1 or not self.run.objective.matches_by_errors:
            return over_processes
        found: list[Tensor] = []

        def note(errors: Tensor) -> Tensor:
            found.append(errors)
            return errors

        with torch.no_grad(), same_random_state():
            if learner is not None:
                learner.bind(self.state.step)
            for batch, share in zip(group, shares, strict=True):
                with self.run.accelerator.autocast():
                    self.run.objective(self.run.small, self._on_device(batch), None, share, note)
        agreed = over_processes(torch.stack(found).sum(0))
        return lambda errors: agreed

    def _active(self, step: int) -> GateLearner | None:
        return self.learner if self.learner is not None and self.learner.is_active(step) else None

    def _on_device(self, batch: Batch) -> Batch:
        """Move a batch to the model; a GPU copies from page-locked memory without being waited for."""
        rows = batch.get(ROWS)  # read on the CPU
        if self.run.accelerator.device.type == "cuda":
            batch = {name: value.pin_memory() if value.device.type == "cpu" else value for name, value in batch.items()}
        moved = to_model({name: value for name, value in batch.items() if name != REPEATED}, self.run.small)
        return moved if rows is None else {**moved, ROWS: rows}

    def _update(self, learner: GateLearner | None) -> None:
        accelerator, limit = self.run.accelerator, self.run.settings.max_grad_norm
        average_gradients(self.others)
        if limit:
            # The gates' gradients are of another scale: each kind is clipped on its own. Accelerate's own clipping
            # undoes the loss scaling of float16 every time, which may be done once a step.
            accelerator.unscale_gradients()
            for module in (self.model, *(() if learner is None else (learner.gates,))):
                nn.utils.clip_grad_norm_(module.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if learner is not None:
            learner.gates.clamp_()

    def _record(self, parts: dict[str, Tensor]) -> None:
        """Add a step to the running sums; write a history entry every `logging_steps`."""
        state = self.state
        state.sums.add(parts)
        if state.total_steps % self.run.settings.logging_steps and state.step < self.total:
            return
        self._check_finite()
        means = state.sums.take()
        learner = self._active(state.step - 1)
        if learner is not None:
            means.update(learner.progress(state.step - 1))
        means["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        self.run.log(means)

    def _check_heard(self) -> None:
        """Make sure that labels were learned from, once an epoch is over: what is read late is not known before.

        :raises TrainingError: when none has counted, in whatever process.
        """
        if self.state.step != min(self.run.steps_in(self.run.batches), self.total):
            return
        if not averaged({"": torch.tensor(float(self.heard), device=self.run.accelerator.device)})[""]:
            raise TrainingError(
                f"train_dataset: in {self.state.step} steps the loss counted no label (all are -100): label some rows, "
                "or pass a teacher and label_weight=0"
            )

    def _due(self, every: int | Literal["epoch"]) -> bool:
        """Return whether something that happens at an interval of steps, or once an epoch, is due now."""
        if self.state.step == self.total:
            return True
        if every == "epoch":
            return self.state.batches_seen % len(self.run.batches) == 0
        return self.state.total_steps % every == 0

    def _evaluate(self, evaluate: Callable[[nn.Module], dict[str, float]]) -> None:
        self._check_finite()
        values: dict[str, float] = {}
        learner = self._active(self.state.step - 1)
        if learner is not None:
            learner.settle()
            values["sparsity"] = learner.sparsity()
        values.update(evaluate(self.run.small))
        self.run.log(values)
        self._keep_best(values)

    def _keep_best(self, values: dict[str, float]) -> None:
        """Keep the weights of the best evaluation, among those with the structure that counts."""
        metric = self.run.settings.metric_for_best_model
        if metric is None or self.state.phase == "prune":
            return  # while pruning, the structure is still on its way to the target
        name = metric_name(metric, values)
        value = values[name] if self.run.settings.greater_is_better else -values[name]
        if math.isnan(value):
            return
        if self.state.best is None or value > self.state.best["value"]:
            tensors = {name: item.detach().clone() for name, item in self.run.small.state_dict().items()}
            self.state.best = {"value": value, "step": self.state.total_steps, "model": tensors}

    def save(self) -> None:
        """Write a checkpoint, unless there is no folder for it, or this step has one already."""
        run, state = self.run, self.state
        if run.folder is None or self.last_saved == state.total_steps:
            return
        self._check_finite()
        check_weights(run.small, f"after step {state.total_steps}, the model")
        if self.learner is not None:
            self.learner.masks.unbind()
        self.last_saved = state.total_steps
        save_checkpoint(run.folder, state, run.fingerprint, rank=run.accelerator.process_index)

    def _interrupted(self) -> bool:
        """Return whether this process, or any other of the run, was asked to stop."""
        accelerator, interrupt = self.run.accelerator, self.run.interrupt
        if accelerator.num_processes == 1:
            return interrupt.requested is not None
        if self.state.total_steps % _ASK_OTHERS and self.state.step < self.total:
            return False
        asked = accelerator.gather(torch.tensor([interrupt.requested or 0], device=accelerator.device))
        interrupt.requested = int(asked.max()) or None
        return interrupt.requested is not None

    def _stop(self) -> None:
        self.save()
        if self.learner is not None:
            self.learner.settle()
        step, folder = self.state.total_steps, self.run.folder
        message = (
            f"Stopped after step {step}; the checkpoint is in {folder}. "
            "Call again with the same arguments and resume=True to go on."
            if folder is not None
            else f"Stopped after step {step}; without an output_dir nothing was saved. "
            "The model holds the weights of that step."
        )
        self.run.interrupt.stop(message)

    def _check_finite(self) -> None:
        """Make sure that nothing is logged or kept after a loss that is not a number, in whatever process."""
        self.state.sums.values = averaged(self.state.sums.values)
        loss = self.state.sums.values.get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            self._not_a_number(step=self.state.total_steps)

    def _not_a_number(self, *, step: int) -> NoReturn:
        folder = self.run.folder
        saved = folder is not None and has_checkpoints(folder)
        where = f"the last good checkpoint is in {folder}" if saved else "there is no checkpoint yet"
        raise TrainingError(
            f"the loss is not a number at step {step} of phase {self.state.phase!r}; {where}. "
            "A lower learning_rate, or mixed_precision='bf16' instead of 'fp16', usually helps."
        )

    def leave(self) -> None:
        """Give the model back as it was handed in: unwrapped, and out of training's random samples."""
        accelerator = self.run.accelerator
        inner = accelerator.unwrap_model(self.model, keep_fp32_wrapper=False, keep_torch_compile=False)
        if self.model is not inner:
            inner.__dict__.pop("forward", None)  # Accelerate leaves the class's own one behind on the instance
        if self.learner is not None:
            self.learner.masks.unbind()
        accelerator.free_memory()

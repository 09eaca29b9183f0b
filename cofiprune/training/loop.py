"""The loop of one phase: batches in, optimiser steps out, on Accelerate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from cofiprune.data.batches import ROWS, Batch, Batches, to_model
from cofiprune.errors import SettingsError, TrainingError, suggest
from cofiprune.training.checks import check_weights
from cofiprune.training.compiling import compiled
from cofiprune.training.config import PruneConfig
from cofiprune.training.gating import Gating
from cofiprune.training.interrupt import Interrupt
from cofiprune.training.objective import Objective
from cofiprune.training.prefetch import loaded
from cofiprune.training.progress import Display
from cofiprune.training.state import RunState, has_checkpoints, save_checkpoint

Callback = Callable[[dict[str, Any]], None]

_ASK_OTHERS = 10
"""Steps after which processes ask one another whether to stop."""


@dataclass
class Session:
    """What all phases of a run share."""

    accelerator: Accelerator
    config: PruneConfig
    batches: Batches
    display: Display
    interrupt: Interrupt
    callbacks: Sequence[Callback] = ()
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None
    output_dir: Path | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)


class Loop:
    """Runs one phase from wherever its state stands to its last step."""

    def __init__(
        self,
        session: Session,
        state: RunState,
        objective: Objective,
        *,
        total: int,
        rates: Callable[[int], list[float]],
        gating: Gating | None = None,
    ) -> None:
        """Set up a phase.

        :param state: its `modules["model"]` is trained; whatever learns beside it is in the optimiser too.
        :param total: optimiser steps of the phase.
        :param rates: learning rates of the optimiser's parameter groups at a step.
        """
        self.session = session
        self.state = state
        self.objective = objective
        self.total = total
        self.rates = rates
        self.gating = gating
        # Alone, the model is used as it is: `prepare_model` would replace its forward for mixed precision, which
        # the autocast around each step does as well, and copies of the model would keep the replacement.
        several = session.accelerator.num_processes > 1
        inner = state.modules["model"]
        self.model = compiled(session.accelerator.prepare_model(inner) if several else inner, session.config)
        self.optimizer = session.accelerator.prepare_optimizer(state.optimizer)
        self.last_saved = state.total_steps
        beside = [module for name, module in state.modules.items() if name not in ("model", "full", "teacher")]
        self.beside = [parameter for module in beside for parameter in module.parameters()]
        if several:
            # What was fitted or measured on a process's own rows must start out the same everywhere.
            for parameter in self.beside:
                broadcast(parameter.data)

    def run(self, until: int | None = None) -> None:
        """Train to the end of the phase, or until so many of its steps are done, to go on later.

        :raises TrainingError: when the loss is not a number.
        :raises KeyboardInterrupt: on Ctrl-C, after a checkpoint has been written.
        """
        paused = False
        try:
            self._run(self.total if until is None else until)
            paused = self.state.step < self.total
        finally:
            if not paused:
                self.leave()

    def _run(self, until: int) -> None:
        state, session = self.state, self.session
        session.display.begin(state.phase, total=self.total, done=state.step)
        started = time.perf_counter() - state.seconds
        groups, drops_out = self._groups(), self._drops_out()
        while state.step < until:
            self.model.train(drops_out)
            parts = self._step(next(groups))
            state.step += 1
            state.total_steps += 1
            state.seconds = time.perf_counter() - started
            session.display.advance()
            self._record(parts)
            if self._due(session.config.eval_steps) and session.evaluate is not None:
                self._evaluate()
            if session.output_dir is not None and self._due(session.config.checkpoint_steps):
                self.save()
            if self._interrupted():
                self._stop()

    def _drops_out(self) -> bool:
        """Whether the model trains in train mode: with its dropout, and whatever else it leaves out at random."""
        if self.session.config.dropout is not None:
            return self.session.config.dropout
        # Gradient checkpointing looks at the mode too.
        modules = self.state.modules["model"].modules()
        checkpointing = any(getattr(module, "gradient_checkpointing", False) is True for module in modules)
        return self.objective.teacher is None or checkpointing

    def _groups(self) -> Iterator[list[Batch]]:
        """Give the batches of one optimiser step at a time, from the state's position on, epoch after epoch."""
        batches, size = self.session.batches, self.session.config.gradient_accumulation_steps
        while True:
            epoch, done = divmod(self.state.batches, len(batches))
            batches.set_epoch(epoch)
            batches.skip(done)
            group: list[Batch] = []
            for position, batch in enumerate(loaded(batches, self.session.accelerator.device), start=done + 1):
                group.append(batch)
                if len(group) == size or position == len(batches):
                    self.state.batches += len(group)
                    yield group
                    group = []

    def _step(self, group: list[Batch]) -> dict[str, Tensor]:
        accelerator, step = self.session.accelerator, self.state.step
        for target, rate in zip(self.optimizer.param_groups, self.rates(step), strict=True):
            target["lr"] = rate
        active = self.gating is not None and self.gating.is_active(step)
        parts: dict[str, Tensor] = {}
        for index, batch in enumerate(group):
            on_device = to_model(batch, self.state.modules["model"])  # type: ignore[arg-type]
            if ROWS in batch:
                on_device[ROWS] = batch[ROWS]  # read on the CPU
            last = index == len(group) - 1
            if self.gating is not None and active:
                self.gating.bind(step * self.session.config.gradient_accumulation_steps + index)
            with nullcontext() if last else accelerator.no_sync(self.model), accelerator.autocast():
                alive = self.gating.alive_layers() if self.gating is not None and active else None
                found = self.objective(self.model, on_device, alive)
                if self.gating is not None and active and last:
                    penalty, sparsity = self.gating.penalty(step)
                    found["constraint"] = penalty
                    parts["expected_sparsity"] = sparsity
                loss = found["loss"] / len(group) + found.get("constraint", 0.0)
            accelerator.backward(loss)
            for name, value in found.items():
                parts[name] = parts.get(name, 0) + value.detach() / (1 if name == "constraint" else len(group))
        if parts["loss"].device.type == "cpu" and not math.isfinite(float(parts["loss"])):
            # Looking is free here. On other devices it would wait for every step; they look before anything is kept.
            self.optimizer.zero_grad(set_to_none=True)
            self._not_a_number(step=self.state.total_steps + 1)
        self._update(active)
        return parts

    def _update(self, active: bool) -> None:
        accelerator, limit = self.session.accelerator, self.session.config.max_grad_norm
        if accelerator.num_processes > 1:
            for parameter in self.beside:
                if parameter.grad is not None:
                    parameter.grad = accelerator.reduce(parameter.grad, "mean")
        if limit:
            # The gates' gradients are of another scale: each kind is clipped on its own.
            accelerator.clip_grad_norm_(self.model.parameters(), limit)
            if self.gating is not None and active:
                accelerator.clip_grad_norm_(self.gating.gates.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.gating is not None and active:
            self.gating.gates.clamp_()

    def _record(self, parts: dict[str, Tensor]) -> None:
        """Add a step to the running sums; write a history entry every `logging_steps`."""
        state = self.state
        for name, value in parts.items():
            state.sums[name] = state.sums[name] + value if name in state.sums else value
        state.summed += 1
        if state.total_steps % self.session.config.logging_steps and state.step < self.total:
            return
        self._check_finite()
        means = {name: float(value) / state.summed for name, value in state.sums.items()}
        if "expected_sparsity" in parts:
            means["expected_sparsity"] = float(parts["expected_sparsity"])
        if self.gating is not None and self.gating.is_active(state.step - 1):
            means["target_sparsity"] = self.gating.target_at(state.step - 1)
        means["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        log(self.session, self.state, means)
        state.sums, state.summed = {}, 0

    def _due(self, every: int | Literal["epoch"]) -> bool:
        """Whether something that happens every so many steps, or once an epoch, happens now."""
        if self.state.step == self.total:
            return True
        if every == "epoch":
            return self.state.batches % len(self.session.batches) == 0
        return self.state.total_steps % every == 0

    def _evaluate(self) -> None:
        assert self.session.evaluate is not None
        self._check_finite()
        values: dict[str, float] = {}
        if self.gating is not None and self.gating.is_active(self.state.step - 1):
            self.gating.settle()
            values["sparsity"] = self.gating.sparsity()
        values.update(self.session.evaluate(self.state.modules["model"]))
        log(self.session, self.state, values)
        self._keep_best(values)

    def _keep_best(self, values: dict[str, float]) -> None:
        """Keep the weights of the best evaluation, among those with the structure that counts."""
        metric = self.session.config.metric_for_best_model
        if metric is None or self.state.phase == "prune":
            return  # while pruning, the structure is still on its way to the target
        name = metric_name(metric, values)
        value = values[name] if self.session.config.prefers_greater() else -values[name]
        if math.isnan(value):
            return
        if self.state.best is None or value > self.state.best["value"]:
            tensors = {name: item.detach().clone() for name, item in self.state.modules["model"].state_dict().items()}
            self.state.best = {"value": value, "step": self.state.total_steps, "model": tensors}

    def save(self) -> Path | None:
        """Write a checkpoint, unless this step has one already."""
        session, state = self.session, self.state
        if session.output_dir is None or self.last_saved == state.total_steps:
            return None
        self._check_finite()
        check_weights(state.modules["model"], f"after step {state.total_steps}, the model")
        if self.gating is not None:
            self.gating.masks.unbind()
        self.last_saved = state.total_steps
        return save_checkpoint(
            session.output_dir,
            state,
            session.fingerprint,
            rank=session.accelerator.process_index,
            wait=session.accelerator.wait_for_everyone,
        )

    def _interrupted(self) -> bool:
        """Whether this process, or any other of the run, was asked to stop."""
        accelerator, interrupt = self.session.accelerator, self.session.interrupt
        if accelerator.num_processes == 1:
            return interrupt.requested is not None
        if self.state.total_steps % _ASK_OTHERS and self.state.step < self.total:
            return False
        asked = accelerator.gather(torch.tensor([interrupt.requested or 0], device=accelerator.device))
        interrupt.requested = int(asked.max()) or None
        return interrupt.requested is not None

    def _stop(self) -> None:
        self.save()
        if self.gating is not None:
            self.gating.settle()
        folder = self.session.output_dir
        message = (
            f"Stopped after step {self.state.total_steps}; the checkpoint is in {folder}. "
            "Call again with the same arguments and resume=True to go on."
            if folder is not None
            else f"Stopped after step {self.state.total_steps}; without an output_dir nothing was saved. "
            "The model holds the weights of that step."
        )
        self.session.interrupt.stop(message)

    def _check_finite(self) -> None:
        """Make sure that nothing is logged or kept after a loss that is not a number."""
        loss = self.state.sums.get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            self._not_a_number(step=self.state.total_steps)

    def _not_a_number(self, *, step: int) -> NoReturn:
        folder = self.session.output_dir
        saved = folder is not None and has_checkpoints(folder)
        where = f"the last good checkpoint is in {folder}" if saved else "there is no checkpoint yet"
        raise TrainingError(
            f"the loss is not a number at step {step} of phase {self.state.phase!r}; {where}. "
            "A lower learning_rate, or mixed_precision='bf16' instead of 'fp16', usually helps."
        )

    def leave(self) -> None:
        """Give the model back as it was handed in: unwrapped, and out of training's random samples."""
        inner = self.session.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False, keep_torch_compile=False)
        if self.model is not inner:
            inner.__dict__.pop("forward", None)  # Accelerate leaves the class's own one behind on the instance
        if self.gating is not None:
            self.gating.masks.unbind()
        self.session.accelerator.free_memory()


def log(session: Session, state: RunState, values: Mapping[str, Any]) -> None:
    """Add an entry to the history, show it and hand it to the callbacks."""
    entry = {
        "phase": state.phase,
        "step": state.total_steps,
        "epoch": round(state.batches / len(session.batches), 4),
        "seconds": round(state.seconds, 3),
        **values,
    }
    state.history.append(entry)
    session.display.show(entry)
    for callback in session.callbacks:
        callback(dict(entry))


def metric_name(metric: str, values: Iterable[str]) -> str:
    """Return the name under which an evaluation gives a metric, with or without the prefix `eval_`.

    :raises SettingsError: when it gives no such metric.
    """
    found = next((name for name in values if name in (metric, f"eval_{metric}")), None)
    if found is None:
        known = [name.removeprefix("eval_") for name in values if name.startswith("eval_")]
        raise SettingsError(
            f"metric_for_best_model={metric!r} is not among the metrics of the evaluation: {', '.join(known)}."
            f"{suggest(metric, known)} compute_metrics can add others"
        )
    return found


def decay_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters into matrices, which decay, and biases and norms, which do not."""
    trained = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    return [
        {"params": [p for _, p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for _, p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]

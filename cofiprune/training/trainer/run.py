"""One `Trainer.train()` under a pruning callback: gates, multipliers and projection, and their optimiser's steps.

The gates get their gradient of the task from the Trainer's own backward, through the masks that the model runs
under. What does not depend on the batch, the constraint, is added to that gradient before each step.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cofiprune.compaction.slicing import compacted, write_back
from cofiprune.data.batches import Batches
from cofiprune.errors import CheckpointError, TrainingError
from cofiprune.hooks import evaluating
from cofiprune.plan import Plan
from cofiprune.structure import Structure
from cofiprune.training.checkpoint import SavedRun, has_state, read_state, write_state
from cofiprune.training.identity import digest_of_weights
from cofiprune.training.learner import GateLearner, average_gradients, start_alike
from cofiprune.training.objective import Objective
from cofiprune.training.state import RunState
from cofiprune.training.trainer.forward import ForwardHooks, RemainingMasks, undoing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FOLDER = "cofiprune"
"""The folder added to a checkpoint of the Trainer."""


@dataclass(eq=False)
class CallbackRun:
    """Gates, multipliers and projection for the model of a Trainer, and their optimiser."""

    model: PreTrainedModel
    learner: GateLearner
    """On the masks of what one shot has left of the model."""
    teacher: PreTrainedModel | None
    """In eval mode until `finish`."""
    batches: Batches | None
    """Of the Trainer's rows, where there is a teacher."""
    args: Any
    """The Trainer's."""
    undo: ExitStack
    """Makes the model what it was; closed when the first step goes wrong."""
    plan: Plan | None = None
    """What stays, once it is decided."""

    def __post_init__(self) -> None:
        """Set up the optimiser, the same on every process, and the hooks."""
        learner, objective = self.learner, None
        assert isinstance(learner.masks, RemainingMasks)
        self.masks = learner.masks
        self.masks.dense.kept_elsewhere = True  # by `save`, until the end
        self.begun = time.monotonic()  # less the seconds of the parts before it was resumed
        self._teacher_mode = ExitStack()
        if self.teacher is not None and self.batches is not None:
            self._teacher_mode.enter_context(evaluating(self.teacher.to(self.model.device)))  # type: ignore[arg-type]
            objective = Objective(self.model, self.teacher, self.batches, learner.settings)
        groups = learner.groups()
        modules: dict[str, nn.Module] = {"gates": learner}
        if objective is not None and objective.projection is not None:
            modules["projection"] = objective.projection
            groups.append({"params": list(objective.projection.parameters())})
        self.learned = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=groups[0]["lr"], weight_decay=0.0)
        extra = {"start": self.masks.start.to_dict(), "plan": None}
        self.state = RunState("prune", modules, self.optimizer, extra=extra)
        start_alike(self.learned)
        self.hooks = ForwardHooks(self.model, learner, objective, self.state, self.args, self.undo)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def begin_step(self, step: int, batches: int | None) -> None:
        """Say which step the next forwards belong to.

        :param batches: of an epoch; None where it has no length.
        """
        share = 1 / micro_batches(step, self.args.gradient_accumulation_steps, batches)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            share /= self.args.world_size  # by which the Trainer multiplies
        self.hooks.begin(step, gated=self.plan is None and self.learner.is_active(step), share=share)

    def step(self, step: int, optimizer: Any) -> None:
        """Step gates, multipliers and projection.

        :param optimizer: the Trainer's, with the gradients of the same step.
        :raises TrainingError: when the Trainer's loss did not reach the gates or the teacher, or was not a number. In
            the first step the model is then what it came as.
        """
        with undoing(self.undo):
            self._check_reached()
            self._step(step, optimizer)
        self.undo.pop_all()

    def _check_reached(self) -> None:
        if self.hooks.objective is not None and not self.hooks.teacher_used:
            raise TrainingError(
                "the Trainer trains on another loss than the one that the model returns, so that the teacher is not "
                "heard: leave out the compute_loss of its own, or the teacher"
            )
        if self.hooks.gated and self.learner.gates.log_alpha.grad is None:
            raise TrainingError(
                "no gradient reached the gates: the Trainer's loss does not come from a call of the model itself"
            )

    def _step(self, step: int, optimizer: Any) -> None:
        gated, learner = self.hooks.gated, self.learner
        scaler = getattr(optimizer, "scaler", None)
        average_gradients(self.learned, scale=1.0 if scaler is None else float(scaler.get_scale()))
        if gated:
            learner.penalty(step).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(learner.gates.parameters(), self.args.max_grad_norm or math.inf)
        gradients = [parameter.grad for parameter in self.learned if parameter.grad is not None]
        if bool(torch.isfinite(nn.utils.get_total_norm(gradients))):
            if "projection" in self.state.modules:
                self.optimizer.param_groups[-1]["lr"] = optimizer.param_groups[0]["lr"]
            self.optimizer.step()
            if gated:
                learner.gates.clamp_()
        elif scaler is None:
            raise TrainingError(f"the loss is not a number at step {step + 1}. A lower learning_rate usually helps")
        self.optimizer.zero_grad(set_to_none=True)

    def end_step(self, done: int) -> bool:
        """Note that `done` steps are done; returns whether the structure was decided after this one."""
        self.learner.masks.unbind()  # the graph of the samples is of no use any more
        if self.plan is not None or done < self.learner.schedule.before + self.learner.schedule.gated:
            return False
        self.decide()
        return True

    def decide(self) -> Plan:
        """Choose what stays, bring the factors of its gates into the weights, and run under that from now on."""
        masks = self.masks.dense

        def small(decided: Plan) -> PreTrainedModel:
            return compacted(self.model, masks.structure, self.masks.start.then(decided))

        decided = self.learner.decide(small)
        plan = self.masks.start.then(decided)
        write_back(self.model, masks.structure, small(decided), plan)
        return self._run_under(plan.hard)

    def _run_under(self, plan: Plan) -> Plan:
        self.masks.dense.set_plan(plan)
        self.plan, self.hooks.gated = plan, False
        self.state.extra["plan"] = plan.to_dict()
        return plan

    def finish(self) -> None:
        """Leave the model under its masks alone, and the teacher as it came."""
        self.masks.dense.kept_elsewhere = False
        self.hooks.remove()
        self._teacher_mode.close()

    def progress(self, step: int, *, trained: bool) -> dict[str, float]:
        """Return what a log says about pruning.

        :param step: the last one.
        :param trained: it is a log of training, not of an evaluation.
        """
        found: dict[str, float] = {}
        if trained:
            found.update(self.state.sums.take())
        if trained and self.plan is None:
            found.update(self.learner.progress(step))
        if self.plan is not None or not trained:
            found["sparsity"] = self.masks.dense.sparsity()
        return found

    def save(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        """Add gates, multipliers and projection to a checkpoint that the Trainer wrote."""
        self.state.seconds = self.seconds
        self.state.extra["weights"] = digest_of_weights(self.model)
        write_state(folder / FOLDER, self.state, fingerprint)

    def restore(self, saved: SavedRun) -> None:
        """Take up what `load_beside` read."""
        self.state.restore(saved.captured)
        self.state.extra = saved.extra
        self.begun -= self.state.seconds
        if saved.extra["plan"] is not None:
            self._run_under(Plan.from_dict(saved.extra["plan"]))


@torch.no_grad()
def bring_in(model: PreTrainedModel, structure: Structure, small: PreTrainedModel, plan: Plan, undo: ExitStack) -> None:
    """Write the weights that one shot repaired into a model; `undo` will put back those that it had."""
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    write_back(model, structure, small, plan)
    for name, parameter in model.named_parameters():
        if not torch.equal(before[name], parameter):
            undo.callback(parameter.data.copy_, before[name])


def micro_batches(step: int, accumulation: int, length: int | None) -> int:
    """Batches of an optimiser step; the last one of an epoch may have fewer.

    >>> [micro_batches(step, 4, 10) for step in range(4)]
    [4, 4, 2, 4]
    """
    if length is None:
        return accumulation
    steps = math.ceil(length / accumulation)
    return (length % accumulation or accumulation) if step % steps == steps - 1 else accumulation


def load_beside(args: Any, step: int, fingerprint: dict[str, Any], model: nn.Module) -> SavedRun:
    """Read what a pruning callback saved with the weights that a model holds now.

    :param args: the Trainer's arguments; they say where its checkpoints are.
    :param step: where the Trainer resumes.
    :raises CheckpointError: when it is not there, damaged, of another version, or of another run.
    """
    folders = [Path(args.output_dir) / f"checkpoint-{step}" / FOLDER]
    if args.resume_from_checkpoint:
        folders.insert(0, Path(str(args.resume_from_checkpoint)) / FOLDER)
    folder = next((each for each in folders if has_state(each)), None)
    if folder is None:
        raise CheckpointError(
            f"the Trainer resumes at step {step}, and the gates of that step are missing: there is no complete "
            f"{folders[0]}. Resume from a checkpoint that a run with PruningCallback wrote; one outside of "
            "output_dir is found when TrainingArguments(resume_from_checkpoint=...) names it too"
        )
    saved = read_state(folder, fingerprint, ", or train anew")
    if saved.extra["weights"] != digest_of_weights(model):
        raise CheckpointError(
            f"{folder} is of another run: its gates were saved with other weights than those the Trainer resumes from"
        )
    return saved

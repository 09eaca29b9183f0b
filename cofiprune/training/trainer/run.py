"""One `Trainer.train()` under a pruning callback: gates, multipliers and projection, and their optimiser's steps.

The gates get their gradient of the task from the Trainer's own backward, through the masks that the model runs
under. What does not depend on the batch, the constraint, is added to that gradient before each step.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cofiprune.accounting import layer_parameters, sparsity
from cofiprune.compaction.slicing import compacted, write_back
from cofiprune.data.batches import Batches
from cofiprune.errors import CheckpointError, TrainingError
from cofiprune.hooks import evaluating
from cofiprune.masks import MaskRegistry
from cofiprune.plan import Plan
from cofiprune.selection.target import Target
from cofiprune.structure import Structure
from cofiprune.training.checkpoint import FORMAT_VERSION, RunState, SavedRun, check_same, check_version, write
from cofiprune.training.learner import GateLearner
from cofiprune.training.objective import Objective
from cofiprune.training.resolved import ResolvedSettings, Schedule
from cofiprune.training.trainer.forward import ForwardHooks, RemainingMasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "cofiprune.pt"
"""The file added to a checkpoint of the Trainer; read with `weights_only=True`."""


class CallbackRun:
    """Gates, multipliers and projection for the model of a Trainer, and their optimiser."""

    def __init__(
        self,
        model: PreTrainedModel,
        learner: GateLearner,
        teacher: PreTrainedModel | None,
        batches: Batches | None,
        args: Any,
        *,
        replaced: dict[str, Tensor],
    ) -> None:
        """Set up the optimiser, the same on every process, and the hooks.

        :param learner: on the masks of what one shot has left of the model.
        :param teacher: put into eval mode until `finish`.
        :param batches: of the Trainer's rows, where there is a teacher.
        :param args: the Trainer's arguments.
        :param replaced: weights as they came, to be put back if the first step goes wrong.
        """
        self.model = model
        assert isinstance(learner.masks, RemainingMasks)
        self.masks = learner.masks
        self.learner = learner
        self.args = args
        self.plan: Plan | None = None
        self.sparsity: Tensor | None = None
        """Expected, at the last step."""
        self.begun = time.monotonic()
        """Less the seconds of the parts before it was resumed."""
        self.replaced = replaced
        self._modes = ExitStack()
        objective = None
        if teacher is not None and batches is not None:
            self._modes.enter_context(evaluating(teacher.to(model.device)))  # type: ignore[arg-type]
            objective = Objective(model, teacher, batches, learner.settings)
        groups = learner.groups()
        modules: dict[str, nn.Module] = {"gates": learner}
        if objective is not None and objective.projection is not None:
            modules["projection"] = objective.projection
            groups.append({"params": list(objective.projection.parameters())})
        self.learned = [parameter for group in groups for parameter in group["params"]]
        optimizer = torch.optim.AdamW(groups, lr=groups[0]["lr"], weight_decay=0.0)
        self.optimizer = optimizer
        self.state = RunState("prune", modules, optimizer, extra={"start": self.masks.start.to_dict(), "plan": None})
        if _processes() > 1:
            for parameter in self.learned:
                dist.broadcast(parameter.data, src=0)
        self.hooks = ForwardHooks(self, objective)

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
            the first step the model has the weights then that it came with.
        """
        try:
            self._step(step, optimizer)
        except TrainingError:
            self.put_back()
            raise
        self.replaced = {}

    def put_back(self) -> None:
        """Undo what one shot repaired, unless the first step has been done."""
        put_back(self.model, self.replaced)
        self.replaced = {}

    def _step(self, step: int, optimizer: Any) -> None:
        gated, learner = self.hooks.gated, self.learner
        if self.hooks.objective is not None and not self.hooks.teacher_used:
            raise TrainingError(
                "the Trainer trains on another loss than the one that the model returns, so that the teacher is not "
                "heard: leave out the compute_loss of its own, or the teacher"
            )
        if gated and learner.gates.log_alpha.grad is None:
            raise TrainingError(
                "no gradient reached the gates: the Trainer's loss does not come from a call of the model itself"
            )
        scaler = getattr(optimizer, "scaler", None)
        _unscale_and_average(self.learned, 1.0 if scaler is None else float(scaler.get_scale()))
        if gated:
            penalty, self.sparsity = learner.penalty(step)
            penalty.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(learner.gates.parameters(), self.args.max_grad_norm or math.inf)
        gradients = [parameter.grad.norm() for parameter in self.learned if parameter.grad is not None]
        if not gradients or bool(torch.isfinite(torch.stack(gradients)).all()):
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
        self.hooks.end()
        if self.plan is not None or done < self.learner.schedule.before + self.learner.schedule.gated:
            return False
        self.decide()
        return True

    def decide(self) -> None:
        """Choose what stays, bring the factors of its gates into the weights, and run under that from now on."""
        masks = self.masks.dense

        def small(decided: Plan) -> PreTrainedModel:
            return compacted(self.model, masks.structure, self.masks.start.then(decided))

        decided = self.learner.decide(small)
        plan = self.masks.start.then(decided)
        write_back(self.model, masks.structure, small(decided), plan)
        masks.set_plan(plan.hard)
        self.plan, self.hooks.gated = plan.hard, False
        self.state.extra["plan"] = self.plan.to_dict()

    def finish(self) -> None:
        """Leave the model under its masks alone, and the teacher as it came."""
        self.hooks.remove()
        self._modes.close()

    def progress(self, step: int, *, trained: bool) -> dict[str, float]:
        """Return what a log says about pruning.

        :param step: the last one.
        :param trained: it is a log of training, not of an evaluation.
        """
        found: dict[str, float] = {}
        if trained:
            found.update(self.state.sums.take())
        if trained and self.plan is None and self.sparsity is not None:
            found["expected_sparsity"] = float(self.sparsity)
            found["target_sparsity"] = self.learner.target_at(step)
        if self.plan is not None or not trained:
            found["sparsity"] = self.masks.dense.sparsity()
        return found

    def save(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        """Add gates, multipliers and projection to a checkpoint that the Trainer wrote."""
        self.state.seconds = self.seconds
        payload = {
            "format_version": FORMAT_VERSION,
            "fingerprint": fingerprint,
            "weights": digest(self.model),
            "extra": json.dumps(self.state.extra),
            "captured": self.state.capture(),
        }
        write(folder / FILE, lambda path: torch.save(payload, path))

    def restore(self, saved: SavedRun) -> None:
        """Take up what `load_beside` read."""
        self.state.restore(saved.captured)
        self.state.extra = saved.extra
        self.begun -= self.state.seconds
        if saved.extra["plan"] is not None:
            self.plan = Plan.from_dict(saved.extra["plan"])
            self.masks.dense.set_plan(self.plan)


def gate_learner(
    model: PreTrainedModel,
    masks: MaskRegistry,
    plan: Plan,
    target: Target,
    settings: ResolvedSettings,
    schedule: Schedule,
) -> GateLearner:
    """Set up gates over what a plan keeps of a model.

    :param masks: of the model, all groups.
    """
    structure = masks.structure
    left = structure.cut(plan.kept)
    share = 1 - sparsity(layer_parameters(structure), structure, plan.kept)
    return GateLearner(RemainingMasks(masks, plan, left), target, settings, schedule, layers_left=share)


def bring_in(model: PreTrainedModel, structure: Structure, small: PreTrainedModel, plan: Plan) -> dict[str, Tensor]:
    """Write the weights that one shot repaired into a model; return those that changed, as they were."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    write_back(model, structure, small, plan)
    now = dict(model.named_parameters())
    return {name: value for name, value in before.items() if not torch.equal(value, now[name])}


@torch.no_grad()
def put_back(model: PreTrainedModel, replaced: dict[str, Tensor]) -> None:
    """Undo `bring_in`."""
    for name, value in replaced.items():
        model.get_parameter(name).copy_(value)


def micro_batches(step: int, accumulation: int, length: int | None) -> int:
    """Batches of an optimiser step; the last one of an epoch may have fewer.

    >>> [micro_batches(step, 4, 10) for step in range(4)]
    [4, 4, 2, 4]
    """
    if length is None:
        return accumulation
    steps = math.ceil(length / accumulation)
    return (length % accumulation or accumulation) if step % steps == steps - 1 else accumulation


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _unscale_and_average(parameters: list[nn.Parameter], scale: float) -> None:
    """Take the loss scaling of float16 out of gradients, and average them over the processes."""
    processes = _processes()
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if processes > 1:
            dist.all_reduce(parameter.grad)
        if scale * processes != 1:
            parameter.grad /= scale * processes


def load_beside(args: Any, step: int, fingerprint: dict[str, Any], model: nn.Module) -> SavedRun:
    """Read what a pruning callback saved with the weights that a model holds now.

    :param args: the Trainer's arguments; they say where its checkpoints are.
    :param step: where the Trainer resumes.
    :raises CheckpointError: when it is not there, damaged, of another version, or of another run.
    """
    folders = [Path(args.output_dir) / f"checkpoint-{step}"]
    if args.resume_from_checkpoint and Path(str(args.resume_from_checkpoint)).is_dir():
        folders.insert(0, Path(str(args.resume_from_checkpoint)))
    path = next((folder / FILE for folder in folders if (folder / FILE).is_file()), None)
    if path is None:
        raise CheckpointError(
            f"the Trainer resumes at step {step}, and the gates of that step are missing: there is no "
            f"{folders[0] / FILE}. Resume from a checkpoint that a run with PruningCallback wrote; one outside of "
            "output_dir is found when TrainingArguments(resume_from_checkpoint=...) names it too"
        )
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
        version, saved, weights = int(payload["format_version"]), payload["fingerprint"], payload["weights"]
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: it cannot be read ({error!r})") from error
    check_version(version, path, ", or train anew")
    check_same(fingerprint, saved, f"{path} is of another run", "")
    if weights != digest(model):
        raise CheckpointError(
            f"{path} is of another run: its gates were saved with other weights than those the Trainer resumes from"
        )
    return SavedRun(path.parent, "prune", json.loads(payload["extra"]), payload["captured"])


def digest(model: nn.Module) -> str:
    """Hash a model's biases and norms, which are few and change with every step."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.dim() <= 1:
            found.update(name.encode())
            found.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()

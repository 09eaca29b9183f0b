"""The state of one `Trainer.train()` under a pruning callback: what learns beside the model, and how it takes a step.

The gates get their gradient of the task from the Trainer's own backward, through the masks that the model runs
under. What does not depend on the batch, the constraint, is added to that gradient before each step.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from cofiprune.accounting import layer_parameters, sparsity
from cofiprune.adapter import structure as structure_of
from cofiprune.compaction import compact, restore
from cofiprune.data.batches import Batches
from cofiprune.data.prepare import prepare
from cofiprune.errors import CheckpointError, SettingsError, TrainingError
from cofiprune.hooks import evaluating
from cofiprune.masking import attach
from cofiprune.masks import MaskRegistry
from cofiprune.oneshot.fisher import measured_importance
from cofiprune.oneshot.with_data import can_start
from cofiprune.plan import Plan
from cofiprune.selection.target import Target
from cofiprune.structure import Structure
from cofiprune.training.checkpoint import FORMAT_VERSION, check_same, check_version, write
from cofiprune.training.config import PruneConfig
from cofiprune.training.learner import GateLearner
from cofiprune.training.objective import Objective
from cofiprune.training.resolved import ResolvedSettings
from cofiprune.training.schedule import Schedule
from cofiprune.training.start import Left
from cofiprune.training.trainer.forward import ForwardHooks, RemainingMasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "cofiprune.pt"
"""What is added to a checkpoint of the Trainer; read with `weights_only=True`."""


class CallbackRun:
    """What learns beside the model of a Trainer, and its optimiser."""

    def __init__(
        self,
        model: PreTrainedModel,
        masks: MaskRegistry,
        learner: GateLearner,
        teacher: PreTrainedModel | None,
        batches: Batches | None,
        args: Any,
        *,
        start: Left | None,
    ) -> None:
        """Set up what learns, the same on every process, and bring what one shot repaired into the model.

        :param masks: of the model; the learner's own where it learns on all of it.
        :param teacher: put into eval mode until `finish`.
        :param batches: of the Trainer's rows, where there is a teacher.
        :param args: the Trainer's arguments.
        :param start: what one shot has left for the gates to choose of.
        """
        device = next(model.parameters()).device
        self.model = model
        self.masks = masks
        self.learner = learner
        self.teacher = teacher
        self.args = args
        self.started = None if start is None else start[1]
        self.plan: Plan | None = None
        self.sparsity: Tensor | None = None
        """Expected, at the last step."""
        self.history: list[dict[str, Any]] = []
        self.begun = time.monotonic()
        """Less the seconds of the parts before it was resumed."""
        self._modes = ExitStack()
        objective = None
        if teacher is not None and batches is not None:
            self._modes.enter_context(evaluating(teacher.to(device)))  # type: ignore[arg-type]
            objective = Objective(model if start is None else start[0], teacher, batches, learner.settings)
        self.projection = None if objective is None else objective.projection
        groups = learner.groups()
        if self.projection is not None:
            groups.append({"params": list(self.projection.parameters())})
        self.beside = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=groups[0]["lr"], weight_decay=0.0)
        if _processes() > 1:
            for parameter in self.beside:
                dist.broadcast(parameter.data, src=0)
        kind = torch.bfloat16 if args.bf16 else torch.float16

        def autocast() -> AbstractContextManager[Any]:
            return torch.autocast(device.type, dtype=kind, enabled=bool(args.bf16 or args.fp16))

        self.hooks = ForwardHooks(model, learner, objective, autocast, self._put_back)
        self._replaced: dict[str, Tensor] = {}
        """Weights as they came, of those that one shot repaired, until the first step has gone well."""
        if start is not None:
            before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            restore(model, *start)
            now = dict(model.named_parameters())
            self._replaced = {name: value for name, value in before.items() if not torch.equal(value, now[name])}

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
        """Step what learns beside the model.

        :param optimizer: the Trainer's, with the gradients of the same step.
        :raises TrainingError: when the Trainer's loss did not reach the gates or the teacher, or was not a number. In
            the first step the model has the weights then that it came with.
        """
        try:
            self._step(step, optimizer)
        except TrainingError:
            self._put_back()
            raise
        self._replaced = {}

    def _put_back(self) -> None:
        """Undo what one shot repaired, unless the first step has been done."""
        with torch.no_grad():
            for name, value in self._replaced.items():
                self.model.get_parameter(name).copy_(value)
        self._replaced = {}

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
        _unscale_and_average(self.beside, 1.0 if scaler is None else float(scaler.get_scale()))
        if gated:
            penalty, self.sparsity = learner.penalty(step)
            penalty.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(learner.gates.parameters(), self.args.max_grad_norm or math.inf)
        gradients = [parameter.grad.norm() for parameter in self.beside if parameter.grad is not None]
        if not gradients or bool(torch.isfinite(torch.stack(gradients)).all()):
            if self.projection is not None:
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
        self.masks.unbind()
        started = self.started

        def whole(plan: Plan) -> Plan:
            return plan if started is None else started.then(plan)

        plan = whole(self.learner.decide(lambda found: compact(self.model, whole(found))))
        restore(self.model, compact(self.model, plan), plan)
        self.plan = plan.hard
        self.masks.set_plan(self.plan)
        self.hooks.gated = False

    def finish(self) -> None:
        """Leave the model under its masks alone, and the teacher as it came."""
        self.hooks.remove()
        self._modes.close()

    def progress(self, step: int, *, trained: bool) -> dict[str, float]:
        """What a log says about pruning.

        :param step: the last one.
        :param trained: it is a log of training, not of an evaluation.
        """
        found: dict[str, float] = {}
        if trained:
            found.update(self.hooks.sums.take())
        if trained and self.plan is None and self.sparsity is not None:
            found["expected_sparsity"] = float(self.sparsity)
            found["target_sparsity"] = self.learner.target_at(step)
        if self.plan is not None or not trained:
            found["sparsity"] = self.masks.sparsity()
        return found

    def capture(self, *, with_teacher: bool) -> dict[str, Any]:
        """Return everything that a checkpoint needs, as tensors and plain values."""
        return {
            "gates": self.learner.state_dict(),
            "projection": None if self.projection is None else self.projection.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "teacher": self.teacher.state_dict() if self.teacher is not None and with_teacher else None,
            "start": None if self.started is None else json.dumps(self.started.to_dict()),
            "plan": None if self.plan is None else json.dumps(self.plan.to_dict()),
            "history": json.dumps(self.history),
            "sums": self.hooks.sums.state_dict(),
            "seconds": self.seconds,
        }

    def restore(self, captured: dict[str, Any]) -> None:
        """Take up what `capture` returned."""
        self.learner.load_state_dict(captured["gates"])
        if self.projection is not None:
            self.projection.load_state_dict(captured["projection"])
        if self.teacher is not None and captured["teacher"] is not None:
            self.teacher.load_state_dict(captured["teacher"])
        self.optimizer.load_state_dict(captured["optimizer"])
        self.history = json.loads(captured["history"])
        self.hooks.sums.load_state_dict(captured["sums"], self.learner.gates.log_alpha.device)
        self.begun -= captured["seconds"]
        if captured["plan"] is not None:
            self.plan = Plan.from_dict(json.loads(captured["plan"]))
            self.masks.set_plan(self.plan)


def gate_learner(
    model: PreTrainedModel,
    masks: MaskRegistry,
    target: Target,
    settings: ResolvedSettings,
    schedule: Schedule,
    *,
    start: Left | None,
    rows: Batches | None,
) -> GateLearner:
    """Set up gates on a model, or on what one shot has left of it.

    :param masks: of the model.
    :param rows: what the gates' start is measured on; None where they are restored.
    """
    structure = masks.structure
    left, layers_left = masks, 1.0
    if start is not None:
        left = RemainingMasks(masks, start[1], structure_of(start[0]))
        layers_left -= sparsity(layer_parameters(structure), structure, start[1].kept)
    names = [group.name for group in left.structure.present(settings.units)]
    learner = GateLearner(left, names, target, settings, schedule, layers_left=layers_left)
    if settings.warm_start and rows is not None:
        small = model if start is None else start[0]
        with nullcontext(masks) if start is None else attach(small) as inner:
            importance = measured_importance(small, inner, names, rows, seed=settings.seed)
        learner.gates.initialise_from(importance, spread=settings.warm_start_spread)
    return learner


def begun(captured: dict[str, Any], model: PreTrainedModel) -> Left | None:
    """Return what one shot had left at the beginning of a run, from what `capture` returned."""
    if captured["start"] is None:
        return None
    plan = Plan.from_dict(json.loads(captured["start"]))
    return compact(model, plan), plan


def rows_again(
    loader: Any, model: PreTrainedModel, structure: Structure, config: PruneConfig, args: Any, *, taught: bool
) -> Batches | None:
    """Batches of the Trainer's rows, made anew so that its own loader is not touched; None where not needed.

    :raises SettingsError: when they are needed and the data set has no length.
    :raises DataError: when the first batch is out of the model's range.
    """
    looks = {
        "a teacher": taught,
        "warm_start, which can be False,": config.warm_start,
        "one_shot_share, which can be 0,": config.starts_from_one_shot and can_start(structure, config.units),
    }
    if not any(looks.values()):
        return None
    dataset = getattr(loader, "dataset", None)
    if dataset is None or isinstance(dataset, IterableDataset):
        needs = " and ".join(name for name, asked in looks.items() if asked)
        raise SettingsError(f"rows are looked at beforehand, for {needs} and this train_dataset has no length")
    again: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=args.per_device_train_batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(config.seed),
        collate_fn=loader.collate_fn,
    )
    return prepare(again, model, batch_size=1, seed=config.seed, need_labels=False, name="train_dataset")


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


def save_beside(folder: Path, captured: dict[str, Any], fingerprint: dict[str, Any], model: nn.Module) -> None:
    """Add what a pruning callback knows to a checkpoint that a Trainer wrote.

    :param captured: tensors and plain values.
    """
    payload = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "weights": digest(model),
        "captured": captured,
    }
    write(folder / FILE, lambda path: torch.save(payload, path))


def load_beside(args: Any, step: int, fingerprint: dict[str, Any], model: nn.Module) -> dict[str, Any]:
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
    check_same(fingerprint, saved, path, "")
    if weights != digest(model):
        raise CheckpointError(
            f"{path} is of another run: its gates were saved with other weights than those the Trainer resumes from"
        )
    captured: dict[str, Any] = payload["captured"]
    return captured


def digest(model: nn.Module) -> str:
    """Hash a model's biases and norms, which are few and change with every step."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.dim() <= 1:
            found.update(name.encode())
            found.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()

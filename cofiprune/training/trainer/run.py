"""The state of one `Trainer.train()` under a pruning callback: what learns beside the model, and how it takes a step.

The gates get their gradient of the task from the Trainer's own backward, through the masks that the model runs
under. What does not depend on the batch, the constraint, is added to that gradient before each step.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from cofiprune.adapter import structure as structure_of
from cofiprune.compaction import compact, restore
from cofiprune.data.batches import Batches
from cofiprune.data.prepare import prepare
from cofiprune.distillation import hidden_projection, teacher_layers
from cofiprune.errors import SettingsError, TrainingError
from cofiprune.masking import attach
from cofiprune.masks import MaskRegistry
from cofiprune.oneshot.fisher import measured_importance
from cofiprune.oneshot.with_data import can_start
from cofiprune.plan import Plan
from cofiprune.selection.target import Target
from cofiprune.training.config import PruneConfig
from cofiprune.training.gating import Gating
from cofiprune.training.objective import TOKEN_AXIS, Objective
from cofiprune.training.projection import fitted_projection, hidden_width
from cofiprune.training.schedule import Schedule, gate_rate
from cofiprune.training.start import Start
from cofiprune.training.teacher import Teacher
from cofiprune.training.trainer.forward import ForwardHooks
from cofiprune.training.trainer.masks import RemainingMasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CallbackRun:
    """Gates, multipliers, the map to the teacher's states and their optimiser, on the model of a Trainer."""

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None,
        masks: MaskRegistry,
        target: Target,
        config: PruneConfig,
        schedule: Schedule,
        batches: Batches | None,
        args: Any,
        *,
        start: Start | None,
        fresh: bool,
    ) -> None:
        """Make everything that learns beside the model, the same on every process. Weights stay as they are.

        :param batches: of the Trainer's rows, where there is a teacher or the gates start from what is measured.
        :param args: the Trainer's arguments.
        :param start: what one shot has left for the gates to learn on, where it was asked for.
        :param fresh: nothing is restored afterwards, so that the gates' start is measured.
        """
        self.model = model
        self.teacher = teacher
        self.masks = masks
        self.schedule = schedule
        self.args = args
        self._modes: list[tuple[nn.Module, bool]] = []
        self.plan: Plan | None = None
        self.sparsity: Tensor | None = None
        """Expected, at the last step."""
        self.history: list[dict[str, Any]] = []
        self.begun = time.monotonic()
        """Less the seconds of the parts before it was resumed."""
        self._replaced: dict[str, Tensor] = {}
        """Weights as they came, of those that one shot repaired, until the first step has gone well."""
        self.started = None if start is None else start.plan
        """What one shot kept, of which the gates choose."""
        device = next(model.parameters()).device
        learner, share = (model, 1.0) if start is None else (start.small, start.share)
        left = masks if start is None else RemainingMasks(masks, start.plan, structure_of(start.small))
        chosen = [group.name for group in left.structure.present(config.units)]
        self.gating = Gating(left, chosen, target, config, schedule, share=share)
        if config.warm_start and fresh:
            assert batches is not None
            with nullcontext(masks) if start is None else attach(learner) as inner:
                importance = measured_importance(learner, inner, chosen, batches, seed=config.seed)
            self.gating.gates.initialise_from(importance, spread=config.warm_start_spread)
        self.projection: nn.Linear | None = None
        objective = None
        if teacher is not None:
            assert batches is not None
            self._modes = [(module, module.training) for module in teacher.modules()]
            teacher.to(device).eval()  # type: ignore[arg-type]
            layers: tuple[int, ...] = ()
            if config.distill_layers_weight:
                self.projection = _projection(learner, teacher, batches, device)
                layers = teacher_layers(teacher.config.num_hidden_layers, config.distill_layers)
            asked = Teacher(teacher, layers, token_axis=batches.task in TOKEN_AXIS, memory=0)
            objective = Objective(model, asked, self.projection, batches.task, config, labelled=batches.labelled)
        rate = gate_rate(config, schedule.gated)
        groups = [{"params": list(self.gating.gates.parameters())}, self.gating.constraint.ascent_group(rate)]
        if self.projection is not None:
            groups.append({"params": list(self.projection.parameters())})
        self.beside = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)
        if _processes() > 1:
            for parameter in self.beside:
                dist.broadcast(parameter.data, src=0)
        kind = torch.bfloat16 if args.bf16 else torch.float16

        def autocast() -> AbstractContextManager[Any]:
            return torch.autocast(device.type, dtype=kind, enabled=bool(args.bf16 or args.fp16))

        self.hooks = ForwardHooks(model, self.gating, objective, autocast, self._put_back)

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
        self.hooks.begin(step, gated=self.plan is None and self.gating.is_active(step), share=share)

    def write(self, start: Start) -> None:
        """Bring the weights that one shot repaired into the model."""
        before = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        restore(self.model, start.small, start.plan)
        now = dict(self.model.named_parameters())
        self._replaced = {name: value for name, value in before.items() if not torch.equal(value, now[name])}

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
        """Undo `write`, unless the first step has been done."""
        with torch.no_grad():
            for name, value in self._replaced.items():
                self.model.get_parameter(name).copy_(value)
        self._replaced = {}

    def _step(self, step: int, optimizer: Any) -> None:
        gated, gating = self.hooks.gated, self.gating
        if self.hooks.objective is not None and not self.hooks.heard:
            raise TrainingError(
                "the Trainer trains on another loss than the one that the model returns, so that the teacher is not "
                "heard: leave out the compute_loss of its own, or the teacher"
            )
        if gated and gating.gates.log_alpha.grad is None:
            raise TrainingError(
                "no gradient reached the gates: the Trainer's loss does not come from a call of the model itself"
            )
        scaler = getattr(optimizer, "scaler", None)
        _unscale_and_average(self.beside, 1.0 if scaler is None else float(scaler.get_scale()))
        if gated:
            penalty, self.sparsity = gating.penalty(step)
            penalty.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(gating.gates.parameters(), self.args.max_grad_norm or math.inf)
        gradients = [parameter.grad.norm() for parameter in self.beside if parameter.grad is not None]
        if not gradients or bool(torch.isfinite(torch.stack(gradients)).all()):
            if self.projection is not None:
                self.optimizer.param_groups[-1]["lr"] = optimizer.param_groups[0]["lr"]
            self.optimizer.step()
            if gated:
                gating.gates.clamp_()
        elif scaler is None:
            raise TrainingError(f"the loss is not a number at step {step + 1}. A lower learning_rate usually helps")
        self.optimizer.zero_grad(set_to_none=True)

    def end_step(self, done: int) -> bool:
        """Note that `done` steps are done; returns whether the structure was decided after this one."""
        self.hooks.end()
        if self.plan is not None or done < self.schedule.before + self.schedule.gated:
            return False
        self.decide()
        return True

    def decide(self) -> None:
        """Choose what stays, bring the factors of its gates into the weights, and run under that from now on."""
        self.masks.unbind()
        started = self.started

        def whole(plan: Plan) -> Plan:
            return plan if started is None else started.then(plan)

        plan = whole(self.gating.decide(lambda found: compact(self.model, whole(found))))
        restore(self.model, compact(self.model, plan), plan)
        self.plan = plan.hard
        self.masks.set_plan(self.plan)
        self.hooks.gated = False

    def finish(self) -> None:
        """Leave the model under its masks alone, and the teacher as it came."""
        self.hooks.remove()
        for module, mode in self._modes:
            module.training = mode

    def progress(self, step: int, *, trained: bool) -> dict[str, float]:
        """What a log says about pruning.

        :param step: the last one.
        :param trained: it is a log of training, not of an evaluation.
        """
        found: dict[str, float] = {}
        if trained:
            found.update(self.hooks.take_parts())
        if trained and self.plan is None and self.sparsity is not None:
            found["expected_sparsity"] = float(self.sparsity)
            found["target_sparsity"] = self.gating.target_at(step)
        if self.plan is not None or not trained:
            found["sparsity"] = self.masks.sparsity()
        return found

    def capture(self, *, with_teacher: bool) -> dict[str, Any]:
        """Return everything that a checkpoint needs, as tensors and plain values."""
        return {
            "gates": self.gating.gates.state_dict(),
            "constraint": self.gating.constraint.state_dict(),
            "projection": None if self.projection is None else self.projection.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "teacher": self.teacher.state_dict() if self.teacher is not None and with_teacher else None,
            "start": None if self.started is None else json.dumps(self.started.to_dict()),
            "plan": None if self.plan is None else json.dumps(self.plan.to_dict()),
            "history": json.dumps(self.history),
            "sums": self.hooks.sums,
            "summed": self.hooks.summed,
            "seconds": self.seconds,
        }

    def restore(self, captured: dict[str, Any]) -> None:
        """Take up what `capture` returned."""
        self.gating.gates.load_state_dict(captured["gates"])
        self.gating.constraint.load_state_dict(captured["constraint"])
        if self.projection is not None:
            self.projection.load_state_dict(captured["projection"])
        if self.teacher is not None and captured["teacher"] is not None:
            self.teacher.load_state_dict(captured["teacher"])
        self.optimizer.load_state_dict(captured["optimizer"])
        self.history = json.loads(captured["history"])
        device = self.gating.gates.log_alpha.device
        self.hooks.sums = {name: value.to(device) for name, value in captured["sums"].items()}
        self.hooks.summed = captured["summed"]
        self.begun -= captured["seconds"]
        if captured["plan"] is not None:
            self.plan = Plan.from_dict(json.loads(captured["plan"]))
            self.masks.set_plan(self.plan)


def begun(captured: dict[str, Any], model: PreTrainedModel) -> Start | None:
    """What one shot had left at the beginning of a run, from what `capture` returned."""
    if captured["start"] is None:
        return None
    plan = Plan.from_dict(json.loads(captured["start"]))
    return Start(model, compact(model, plan), plan)


def rows_again(loader: Any, model: PreTrainedModel, config: PruneConfig, args: Any, *, taught: bool) -> Batches | None:
    """Batches of the Trainer's rows, made anew so that its own loader is not touched; None where not needed.

    :raises SettingsError: when they are needed and the data set has no length.
    :raises DataError: when the first batch is out of the model's range.
    """
    looks = {
        "a teacher": taught,
        "warm_start, which can be False,": config.warm_start,
        "one_shot_share, which can be 0,": config.starts_from_one_shot and can_start(structure_of(model), config.units),
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


def _projection(model: PreTrainedModel, teacher: PreTrainedModel, batches: Batches, device: torch.device) -> nn.Linear:
    width, wanted = hidden_width(model), hidden_width(teacher)
    if width == wanted and model.config.num_hidden_layers == teacher.config.num_hidden_layers:
        return hidden_projection(width, wanted).to(device)
    return fitted_projection(model, teacher, batches, device)


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

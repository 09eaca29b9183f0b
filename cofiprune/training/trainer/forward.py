"""A model's forward pass while somebody else's loop trains it: under samples of the gates, with the teacher's loss.

These are hooks of the model, so that any loop and any wrapper around the model meets them, and copies of the model do
not. `RemainingMasks` lets gates over what one shot has left act on the dense model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cofiprune.data.tasks import forward_names, supported_kwargs
from cofiprune.errors import TrainingError
from cofiprune.masks import MaskRegistry
from cofiprune.plan import Plan
from cofiprune.training.learner import GateLearner
from cofiprune.training.objective import Objective
from cofiprune.training.state import RunState

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DRAWS = 1 << 16
"""More forwards than any step has: the noise of step s is drawn by the numbers from s * _DRAWS on."""
_COUNT = "num_items_in_batch"
"""The argument by which the Trainer asks a model to scale its loss for gradient accumulation by itself."""


@contextmanager
def undoing(undo: ExitStack) -> Iterator[None]:
    """Undo what was done to a model when its training turns out to be impossible."""
    try:
        yield
    except TrainingError:
        undo.close()
        raise


@dataclass(eq=False)
class ForwardHooks:
    """Lets a model's training forwards run under samples of the gates and, with a teacher, changes their loss.

    Forwards in evaluation mode, or without gradients, run under the gates' deterministic values, and their loss is
    the model's own. The hooks go with the masks that the gates set.
    """

    model: PreTrainedModel
    learner: GateLearner
    objective: Objective | None
    """The loss with a teacher; None to leave the model's loss alone."""
    state: RunState
    """Gets the parts of the loss."""
    args: Any
    """The Trainer's."""
    undo: ExitStack

    gated: bool = False
    """The gates are learning now."""
    step: int = 0
    share: float = 1.0
    """Weight of a micro-batch in the loss of its step, where the Trainer does not divide by itself."""
    teacher_used: bool = False
    """A backward pass has gone through the objective since `begin`."""
    draws: int = 0
    """Samples that were drawn in this step."""
    _settled: bool = False
    _counted: bool = False
    _wants_states: bool = False

    def __post_init__(self) -> None:
        # Functions, unlike methods, are not copied with the model: a copy's hooks find that it is not this model.
        before = self.model.register_forward_pre_hook(
            lambda module, args, kwargs: self._before(module, args, kwargs), with_kwargs=True
        )
        after = self.model.register_forward_hook(
            lambda module, args, kwargs, output: self._after(module, kwargs, output), with_kwargs=True
        )
        self._handles = [before, after]
        self.learner.masks.on_detach += [handle.remove for handle in self._handles]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def begin(self, step: int, *, gated: bool, share: float) -> None:
        """Say which optimiser step the next forwards belong to."""
        self.step, self.gated, self.share = step, gated, share
        self.teacher_used = False
        self.draws = 0

    def _learns(self, module: nn.Module) -> bool:
        return module.training and torch.is_grad_enabled()

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if module is not self.model:
            return None
        if not self._learns(module):
            if self.gated and not self._settled:
                self.learner.settle()
                self._settled = True
            return None
        if self.gated:
            self.learner.bind(self.step * _DRAWS + self.draws)
            self.draws += 1
            self._settled = False
        if self.objective is None:
            return None
        changed = {**dict(zip(forward_names(self.model), args, strict=False)), **kwargs}
        changed.update(supported_kwargs(self.model, return_dict=True))
        self._counted = changed.pop(_COUNT, None) is not None
        self._wants_states = bool(changed.get("output_hidden_states", self.model.config.output_hidden_states))
        if self.objective.distils_layers:
            changed["output_hidden_states"] = True
        return (), changed

    def _after(self, module: nn.Module, kwargs: Mapping[str, Any], output: Any) -> Any:
        if module is not self.model or self.objective is None or not self._learns(module):
            return None
        batch = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
        kind = torch.bfloat16 if self.args.bf16 else torch.float16
        half = bool(self.args.bf16 or self.args.fp16)  # the Trainer's autocast ends with the model's forward
        with undoing(self.undo), torch.autocast(self.model.device.type, dtype=kind, enabled=half):
            self._check_labels(self.objective, output)
            parts = self.objective.of(output, batch, self.learner.alive_layers())
        self.state.sums.add({name: value.detach() for name, value in parts.items() if name != "loss"})
        loss = parts["loss"] * (self.share if self._counted else 1.0)
        if loss.requires_grad:
            loss.register_hook(lambda gradient: self._note_use())  # type: ignore[no-untyped-call]
        found = {**output, "loss": loss}
        if not self._wants_states:
            found.pop("hidden_states", None)
        # The outputs of an encoder without a head have no such field, and rebuilding them elsewhere would miss it.
        return type(output)(**found) if "loss" in {field.name for field in fields(output)} else found

    def _check_labels(self, objective: Objective, output: Any) -> None:
        if objective.label_weight and output.get("loss") is None:
            raise TrainingError(
                f"in training, the {type(self.model).__name__} was called without labels, so that its loss is computed "
                "outside of it, where the teacher's part cannot be added: leave out compute_loss_func and "
                "label_smoothing_factor, or the teacher, or pass label_weight=0"
            )

    def _note_use(self) -> None:
        self.teacher_used = True


class RemainingMasks(MaskRegistry):
    """The masks of a smaller model, [kept units] by group name, that act on the dense one."""

    def __init__(self, dense: MaskRegistry, plan: Plan) -> None:
        """Take out of the dense model what a plan removes; the rest is all ones.

        :param dense: attached to the model, all groups.
        """
        left = dense.structure.cut(plan.kept)
        values = next(iter(dense.values()))
        super().__init__(left, list(left), device=values.device, dtype=values.dtype)
        self.dense = dense
        self.start = plan
        self.kept = {name: torch.tensor(plan.keep[name], device=values.device) for name in left}
        self.on_detach = dense.on_detach
        dense.set_plan(plan.hard)

    def __setitem__(self, name: str, value: Tensor | Sequence[float]) -> None:
        super().__setitem__(name, value)
        self.dense[name] = self._placed(name, self[name])

    def bind(self, values: Mapping[str, Tensor]) -> None:
        self.dense.bind({name: self._placed(name, value) for name, value in values.items()})

    def unbind(self) -> None:
        self.dense.unbind()

    def alive(self, gate: str) -> bool | Tensor:
        return self.dense.alive(gate)

    def detach(self) -> None:
        self.dense.detach()

    def _placed(self, name: str, value: Tensor) -> Tensor:
        """[units] of the dense model, from [kept units]; differentiable."""
        if len(value) == self.dense.structure[name].size:
            return value
        return value.new_zeros(self.dense.structure[name].size).index_copy(0, self.kept[name], value)

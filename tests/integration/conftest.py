"""The toy task with a teacher that has learned it, and a look at what is trained."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import cofiprune
import small
import toy


@dataclass(frozen=True)
class Toy:
    config = staticmethod(toy.config)
    bert = staticmethod(toy.bert)
    rows = staticmethod(toy.rows)
    snapshot = staticmethod(small.snapshot)
    is_unchanged = staticmethod(small.is_unchanged)
    parameters_of_layers = staticmethod(small.parameters_of_layers)
    teacher: Any

    def student(self) -> Any:
        """A copy of the fine-tuned teacher: where pruning begins."""
        return copy.deepcopy(self.teacher)


@pytest.fixture(scope="session", name="toy")
def _toy() -> Toy:
    """Models and rows of the task, and a teacher that has learned it."""
    teacher = toy.bert()
    torch.manual_seed(0)
    cofiprune.finetune(teacher, toy.rows(192, seed=1), epochs=8, learning_rate=3e-3, batch_size=16, progress=False)
    return Toy(teacher.eval())


@dataclass
class Step:
    """A step of an optimiser."""

    model: Any
    """What was trained: a model that was handed in, or a copy or a smaller model made of it."""
    trains: bool
    """Whether it was in train mode."""
    batch: tuple[int, int]
    """Rows and their length."""
    optimizer: torch.optim.Optimizer

    def __post_init__(self) -> None:
        inside = dict(self.model.named_parameters())
        known = {id(value) for value in inside.values()}
        learns = [value for group in self.optimizer.param_groups for value in group["params"]]
        others = {f"other {index}": value for index, value in enumerate(v for v in learns if id(v) not in known)}
        self.size = sum(value.numel() for value in inside.values())
        self.learns = {**inside, **others}
        self.before = self.after = self.tensors()
        gradients = [[v.grad for v in part.values() if v.grad is not None and v.dim()] for part in (inside, others)]
        self.norms = tuple(float(torch.nn.utils.get_total_norm(each)) for each in gradients)
        """Of the gradients of the model, and of those of everything else but scalars."""

    def tensors(self) -> dict[str, Tensor]:
        """Copy the model's parameters, under their names, what else learns, and the moments of all that."""
        state = self.optimizer.state
        found = {name: value.detach().clone() for name, value in self.learns.items()}
        return found | {
            f"{moment} of {name}": state[value][moment].clone()
            for name, value in self.learns.items()
            for moment in ("exp_avg", "exp_avg_sq", "step")
            if value in state
        }


@pytest.fixture
def watch() -> Iterator[Callable[[torch.nn.Module], list[Step]]]:
    """Watch what is trained, from torch and whatever a run is made of: `steps = watch(model)`."""
    handles = []

    def begin(model: torch.nn.Module) -> list[Step]:
        steps: list[Step] = []
        last: dict[str, Any] = {}

        def forward(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            if torch.is_grad_enabled():
                last.update(model=module, trains=module.training, batch=tuple(kwargs["input_ids"].shape))

        def ends(*rest: Any) -> None:
            steps[-1].after = steps[-1].tensors()

        # A hook on a model is on its copies too.
        handles.append(model.register_forward_pre_hook(forward, with_kwargs=True))
        handles.append(
            register_optimizer_step_pre_hook(lambda optimizer, *rest: steps.append(Step(**last, optimizer=optimizer)))
        )
        handles.append(register_optimizer_step_post_hook(ends))
        return steps

    yield begin
    for handle in handles:
        handle.remove()

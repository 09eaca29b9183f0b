"""The state of a run: all that a checkpoint has to hold for the run to go on exactly where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from cofiprune.errors import CheckpointError

_COUNTS = ("step", "total_steps", "batches_seen", "seconds", "best")


@dataclass
class Sums:
    """Parts of a loss, added up over some steps or batches."""

    values: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0

    def add(self, parts: Mapping[str, Tensor]) -> None:
        """Add the parts of one more."""
        for name, value in parts.items():
            self.values[name] = self.values[name] + value if name in self.values else value
        self.count += 1

    def take(self) -> dict[str, float]:
        """Return the means, and begin anew."""
        means = {name: float(value) / self.count for name, value in self.values.items()}
        self.values, self.count = {}, 0
        return means


@dataclass
class RunState:
    """The modules and the optimiser that learn in the present phase, and plain counts."""

    phase: str = ""
    modules: dict[str, nn.Module] = field(default_factory=dict)
    """Modules whose tensors a checkpoint holds: the trained model under `model`, and others."""
    optimizer: Optimizer | None = None
    step: int = 0
    """Optimiser steps done in this phase."""
    total_steps: int = 0
    """Optimiser steps done in the run."""
    batches_seen: int = 0
    """Batches taken in the run, over all epochs: the position of the sampler."""
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    sums: Sums = field(default_factory=Sums)
    """Parts of the loss since the last entry of the history."""
    best: dict[str, Any] | None = None
    """The best evaluation so far: `value`, `step` and the model's tensors under `model`."""
    scaler: GradScaler | None = None
    """Of the loss, in float16."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Plain values from which a phase is set up again, such as its plan."""

    def begin(self, phase: str) -> None:
        """Start a phase; what counts over the run goes on."""
        self.phase, self.step, self.best, self.sums = phase, 0, None, Sums()

    def capture(self) -> dict[str, Any]:
        """Return everything but `extra` as tensors and plain values."""
        assert self.optimizer is not None
        return {
            "phase": self.phase,
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "history": json.dumps(self.history),
            "sums": asdict(self.sums),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            **{name: getattr(self, name) for name in _COUNTS},
        }

    def restore(self, captured: dict[str, Any]) -> None:
        """Take up what `capture` returned; the modules and the optimiser must be set up alike.

        :raises CheckpointError: when they are not; nothing is changed then.
        """
        assert self.optimizer is not None
        self._check(captured)
        for name, module in self.modules.items():
            module.load_state_dict(captured["modules"][name])
        self.optimizer.load_state_dict(captured["optimizer"])
        for name in _COUNTS:
            setattr(self, name, captured[name])
        self.history = json.loads(captured["history"])
        device = self.optimizer.param_groups[0]["params"][0].device
        values = {name: value.to(device) for name, value in captured["sums"]["values"].items()}
        self.sums = Sums(values, captured["sums"]["count"])
        if self.scaler is not None and captured["scaler"] is not None:
            self.scaler.load_state_dict(captured["scaler"])

    def _check(self, captured: dict[str, Any]) -> None:
        expected = self.capture()
        missing = next((name for name in expected if name not in captured), None)
        if missing is not None:
            raise CheckpointError(f"the checkpoint is damaged: it has no {missing!r}")
        if captured["phase"] != self.phase:
            raise CheckpointError(f"the checkpoint is of phase {captured['phase']!r}, this is {self.phase!r}")
        ours, theirs = list(self.modules), list(captured["modules"])
        if ours != theirs:
            raise CheckpointError(
                f"the checkpoint is of a run with other settings: it holds {', '.join(theirs)}, this run has "
                f"{', '.join(ours)}. Resume with the same arguments, the teacher included"
            )
        shapes, saved = _shapes(expected["modules"]), _shapes(captured["modules"])
        for name in {**shapes, **saved}:
            here, there = (each.get(name, "not there") for each in (shapes, saved))
            if here != there:
                raise CheckpointError(f"the checkpoint is of another model: {name} is {there}, here it is {here}")
        groups = [each["optimizer"]["param_groups"] for each in (expected, captured)]
        trained, was = ([len(group["params"]) for group in each] for each in groups)
        if trained != was:
            raise CheckpointError(
                f"the checkpoint is of a run with other settings: it trains {sum(was)} parameters, this one "
                f"{sum(trained)}"
            )


def _shapes(modules: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """The shape of each tensor, in words, by its name in words."""
    return {
        f"{name!r} of its {module}": f"of shape {list(tensor.shape)}"
        for module, tensors in modules.items()
        for name, tensor in tensors.items()
    }

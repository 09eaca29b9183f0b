"""What a run begins with: one shot, which decides everything, or what the gates start on."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from cofiprune.adapter import structure as structure_of
from cofiprune.compaction import compact
from cofiprune.errors import TargetError
from cofiprune.masks import MaskRegistry
from cofiprune.plan import Plan
from cofiprune.selection.target import Target
from cofiprune.training.loop import log
from cofiprune.training.stage import Finished, Stage
from cofiprune.training.start import Start, one_shot, start_for
from cofiprune.training.state import RunState, SavedRun


class Opening:
    """One shot at the beginning of a run."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.seconds = 0.0

    def decide(self, masks: MaskRegistry, target: Target) -> tuple[Plan, Finished]:
        """Prune on data without training."""
        started = time.perf_counter()
        try:
            found = one_shot(self.stage.model, self.stage.calibrated, self.stage.config, target, self._progress())
            left = target.kept_share(structure_of(found.small))
            if target.measure is None and abs(1 - left - target.share) > target.tolerance:
                raise TargetError(f"in one shot, the nearest to {target} is {target.text(left * target.total)}")
        except BaseException:
            masks.detach()  # nothing was changed yet
            raise
        self.seconds = time.perf_counter() - started
        state = RunState("one-shot", {"model": self.stage.model}, torch.optim.SGD(self.stage.model.parameters()))
        self.log(state, found)
        return found.write_back(masks, Plan.from_values(structure_of(found.small), {})), Finished(state, None)

    def start(self, target: Target, saved: SavedRun | None) -> Start | None:
        """What the gates start on: what one shot leaves, or what it left when the run was saved."""
        if saved is not None:
            if "start" not in saved.extra:
                return None
            plan = Plan.from_dict(saved.extra["start"])
            return Start(self.stage.model, compact(self.stage.model, plan), plan)
        started = time.perf_counter()
        progress = self._progress()
        found = start_for(self.stage.model, self.stage.calibrated, self.stage.config, target, progress)
        self.seconds = time.perf_counter() - started
        return found

    def log(self, state: RunState, start: Start) -> None:
        """Begin the history with what one shot came to."""
        state.seconds = self.seconds
        measured = {} if self.stage.session.evaluate is None else self.stage.session.evaluate(start.small)
        log(self.stage.session, state, {"phase": "one-shot", "sparsity": 1 - start.share, **measured})

    def _progress(self) -> Callable[[float], None]:
        session = self.stage.session
        session.display.begin("one-shot", total=100, done=0)

        def progress(share: float) -> None:
            session.display.reach(round(100 * share))
            if session.interrupt.requested is not None and session.accelerator.num_processes == 1:
                session.interrupt.stop("Stopped in the one-shot stage: the model is as it was.")

        return progress

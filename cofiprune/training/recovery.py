"""The recovery: what a plan keeps trains as a compacted model, and is written back into the full one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cofiprune.accounting import layer_parameters
from cofiprune.adapter import structure as structure_of
from cofiprune.compaction import compact, restore
from cofiprune.errors import TrainingError
from cofiprune.masking import masks_of
from cofiprune.measure.summary import dense_structure
from cofiprune.plan import Plan
from cofiprune.training.schedule import rate, recovery_rate
from cofiprune.training.stage import Finished, Stage
from cofiprune.training.state import RunState, SavedRun

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Recovery:
    """Training of what is left."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def run(
        self, plan: Plan, steps: int, before: Finished | None, saved: SavedRun | None, *, pruned: bool = False
    ) -> Finished:
        """Train what the plan keeps, compacted, and write it back into the full model.

        :param pruned: the full model comes out of the pruning phase, so that its checkpoints must hold it too.
        """
        config = self.stage.config
        small = compact(self.stage.model, plan)
        small.to(self.stage.device)  # type: ignore[arg-type]
        self.stage.freeze_embeddings(small)
        projection = self.stage.projection(small, None if before is None else before.projection, plan)
        groups = self.stage.learning(small, projection)
        modules = self.stage.modules(small, projection, **({"full": self.stage.model} if pruned else {}))
        learning_rate = recovery_rate(config, _kept_share(small))
        state = RunState("recover", modules, torch.optim.AdamW(groups, lr=learning_rate))
        state.extra = {"plan": plan.to_dict(), "steps": steps}
        if before is not None:
            previous = before.state
            state.total_steps, state.batches = previous.total_steps, previous.batches
            state.seconds, state.history = previous.seconds, previous.history
        if pruned:
            self._take_recovery_batches(state, saved)
        warmup = round(config.warmup_ratio * steps)

        def rates(step: int) -> list[float]:
            factor = rate(config.finetune_lr_scheduler_type, step, steps, warmup)
            return [learning_rate * factor] * len(groups)

        loop = self.stage.loop(state, small, projection, rates, steps, None, saved)
        try:
            loop.run()
            if state.best is not None:
                small.load_state_dict(state.best["model"])
        except TrainingError:
            self._set_masks(plan)  # the model stays as it was before the recovery, scales included
            raise
        except BaseException:
            self._write_back(small, plan)
            raise
        self._write_back(small, plan)
        return Finished(state, projection)

    def _take_recovery_batches(self, state: RunState, saved: SavedRun | None) -> None:
        """Go on with the batches of the recovery, at the same place of the epoch."""
        taken = state.batches if saved is None else saved.extra["pruned"]
        state.extra["pruned"] = taken
        self.stage.taken = [(self.stage.batches, taken)]
        part = self.stage.for_recovery()
        state.batches = round(taken * len(part) / len(self.stage.batches))
        self.stage.use(part)

    def _write_back(self, small: PreTrainedModel, plan: Plan) -> None:
        """Bring what was trained into the full model."""
        restore(self.stage.model, small, plan)
        self._set_masks(plan.hard)

    def _set_masks(self, plan: Plan) -> None:
        masks = masks_of(self.stage.model)
        if masks is not None:
            masks.set_plan(plan)


def _kept_share(model: PreTrainedModel) -> float:
    """Parameters of a model's layers by those of the dense model that it comes from."""
    ours, whole = structure_of(model), dense_structure(model)
    return layer_parameters(ours).exact(ours.sizes) / layer_parameters(whole).exact(whole.sizes)

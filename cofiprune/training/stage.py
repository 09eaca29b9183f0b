"""What the phases of a run share: the models, the rows, the session, and how a phase is set up on them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cofiprune.adapter import structure as structure_of
from cofiprune.data.batches import ROWS, Batch, Batches, RowBatches
from cofiprune.data.tasks import label_names
from cofiprune.distillation import hidden_projection, teacher_layers
from cofiprune.plan import Plan
from cofiprune.training.config import PruneConfig
from cofiprune.training.gating import Gating
from cofiprune.training.loop import Loop, Session, decay_groups, metric_name
from cofiprune.training.objective import TOKEN_AXIS, Objective
from cofiprune.training.projection import fitted_projection, hidden_width
from cofiprune.training.state import RunState, SavedRun
from cofiprune.training.teacher import Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Finished:
    """Where a phase ended, for the next one to go on from."""

    state: RunState
    projection: nn.Linear | None


class Stage:
    """The models, the rows and the session of a run; phases take their turns on it."""

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None,
        session: Session,
        calibrated: Batches,
        *,
        teaches_itself: bool,
    ) -> None:
        """Set up for the phases; nothing of the models is changed.

        :param calibrated: all rows, whatever process this is.
        :param teaches_itself: the teacher is a copy of the model as it came, so that checkpoints must hold it.
        """
        self.model = model
        self.teacher = teacher
        self.session = session
        self.calibrated = calibrated
        self.batches = session.batches
        self.teaches_itself = teaches_itself
        self.trains_embeddings = bool(session.config.train_embeddings)
        self.asked: Teacher | None = None
        self.taken: list[tuple[Batches, int]] = []
        """Batches of a phase that is over, and how many of them were taken."""

    @property
    def config(self) -> PruneConfig:
        return self.session.config

    @property
    def device(self) -> torch.device:
        device: torch.device = self.session.accelerator.device
        return device

    def use(self, batches: Batches) -> None:
        """Go on with other batches."""
        self.batches = self.session.batches = batches

    @contextmanager
    def running(self) -> Iterator[None]:
        """Models on the device, embeddings frozen if asked, signals caught; everything put back afterwards."""
        models: list[nn.Module] = [self.model, *([] if self.teacher is None else [self.teacher])]
        modes = [(module, module.training) for model in models for module in model.modules()]
        for model in models:
            model.to(self.device)
        if self.teacher is not None:
            self.teacher.train(False)
        frozen: list[nn.Parameter] = []
        try:
            metric = self.config.metric_for_best_model
            if metric is not None and self.session.evaluate is not None:
                metric_name(metric, self.session.evaluate(self.model))
            frozen = self.freeze_embeddings(self.model)
            with self.session.display, self.session.interrupt:
                yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
            for module, mode in modes:
                module.training = mode

    def freeze_embeddings(self, model: PreTrainedModel) -> list[nn.Parameter]:
        if self.trains_embeddings:
            return []
        tables = set(structure_of(model).embeddings)
        frozen = [p for name, p in model.named_parameters() if name in tables and p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        return frozen

    def for_recovery(self) -> Batches:
        """The batches of the recovery, which may have another size."""
        size = self.config.finetune_batch_size
        return self.batches.resized(size) if size and isinstance(self.batches, RowBatches) else self.batches

    def projection(
        self, model: PreTrainedModel, learned: nn.Linear | None, plan: Plan | None = None
    ) -> nn.Linear | None:
        """The map for the layers' distillation; None where nothing is distilled."""
        if self.teacher is None or not self.config.distill_layers_weight:
            return None
        if learned is not None and plan is not None:
            return learned
        width, wanted = hidden_width(model), hidden_width(self.teacher)
        same_depth = model.config.num_hidden_layers == self.teacher.config.num_hidden_layers
        if plan is None and width == wanted and same_depth:
            return hidden_projection(width, wanted).to(self.device)
        self.batches.set_epoch(0)
        self.batches.skip(0)
        return fitted_projection(model, self.teacher, self.batches, self.device)

    def learning(self, model: PreTrainedModel, projection: nn.Linear | None) -> list[dict[str, Any]]:
        """The optimiser's groups of everything that learns but gates."""
        return [
            *decay_groups(model.named_parameters(), self.config.weight_decay),
            *([{"params": list(projection.parameters()), "weight_decay": 0.0}] if projection is not None else []),
        ]

    def modules(self, model: nn.Module, projection: nn.Linear | None, **more: nn.Module) -> dict[str, nn.Module]:
        """What a checkpoint holds the tensors of."""
        modules = {"model": model, **more}
        if projection is not None:
            modules["projection"] = projection
        if self.teaches_itself and self.teacher is not None:
            modules["teacher"] = self.teacher
        return modules

    def loop(
        self,
        state: RunState,
        model: PreTrainedModel,
        projection: nn.Linear | None,
        rates: Callable[[int], list[float]],
        steps: int,
        gating: Gating | None,
        saved: SavedRun | None,
    ) -> Loop:
        """Set up a phase, from its beginning or from where it was saved."""
        objective = Objective(
            model, self.answers(projection), projection, self.batches.task, self.config, labelled=self.batches.labelled
        )
        state.scaler = self.session.accelerator.scaler
        if saved is not None:
            state.restore(saved.captured)
            self._remember(state)
            saved.restore_rng(self.session.accelerator.process_index)
        return Loop(self.session, state, objective, total=steps, rates=rates, gating=gating)

    def answers(self, projection: nn.Linear | None) -> Teacher | None:
        """The teacher with its memory, the same in all phases."""
        if self.teacher is None:
            return None
        if self.asked is None:
            layers = (
                ()
                if projection is None
                else teacher_layers(self.teacher.config.num_hidden_layers, self.config.distill_layers)
            )
            memory = 0
            if self.batches.in_memory:
                memory = self.config.teacher_memory_mb * 2**20 if self.batches.task != "other" else 0
                for batches in (self.batches, *(batches for batches, _ in self.taken)):
                    batches.with_rows = memory > 0
            token_axis = self.batches.task in TOKEN_AXIS
            self.asked = Teacher(self.teacher, layers, token_axis=token_axis, memory=memory)
        return self.asked

    def _remember(self, state: RunState) -> None:
        """Fill the teacher's memory as it was: its answers depend, in the last digits, on what they were padded to."""
        teacher = self.asked
        if teacher is None or not self.batches.with_rows:
            return
        labels = {ROWS, *label_names(self.model)}
        for batches, count in (*self.taken, (self.batches, state.batches)):
            for batch in _first(batches, count):
                if not teacher.knows(batch[ROWS]):
                    inputs = {name: value.to(self.device) for name, value in batch.items() if name not in labels}
                    with self.session.accelerator.autocast():
                        teacher.answer(inputs, batch[ROWS])


def _first(batches: Batches, count: int) -> Iterator[Batch]:
    """The batches that were taken first, over all epochs."""
    for epoch in range(-(-count // len(batches))):
        batches.set_epoch(epoch)
        batches.skip(0)
        yield from itertools.islice(batches, count - epoch * len(batches))

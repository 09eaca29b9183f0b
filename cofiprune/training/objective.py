"""The loss of a step: labels, the teacher's outputs, and the states of its layers, each by its weight.

Shapes: B examples, T tokens of the batch, S teacher layers distilled, H hidden.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofiprune.data.batches import REPEATED, ROWS, Batches, model_inputs, to_model
from cofiprune.data.cached import CACHED
from cofiprune.data.mixed import NUMBERS, UNLABELLED
from cofiprune.data.tasks import IGNORED, Task, class_order, label_names, supported_kwargs, task_of
from cofiprune.distillation import (
    hidden_projection,
    layerwise_loss,
    logit_loss,
    predictions,
    teacher_layers,
)
from cofiprune.errors import TrainingError
from cofiprune.hooks import evaluating
from cofiprune.parts import encoder_config, heads_of_stages
from cofiprune.training.processes import averaged
from cofiprune.training.resolved import ResolvedSettings
from cofiprune.training.teacher import CachedTeacher, Teacher, hidden_width, last_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKEN_AXIS: tuple[Task, ...] = ("token-classification", "masked-lm", "question-answering", "embedding")
"""Tasks whose predictions have a token axis."""
_PARTS = ("label_loss", "logits_loss", "layers_loss")
_FIT_BATCHES = 8
_RIDGE = 1e-3

Agree = Callable[[Tensor], Tensor]


def over_processes(errors: Tensor) -> Tensor:
    """Return the errors of a step by which layers are matched, from those of this process's batch."""
    return averaged({"": errors})[""]


class Objective:
    """Computes the loss of a batch for a student, with or without a teacher."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        batches: Batches,
        settings: ResolvedSettings,
        *,
        fitted: bool = False,
        memory: int = 0,
    ) -> None:
        """Set up the parts that count, on the device of the student.

        :param batches: whose task and labels it is for, and on which a projection is fitted.
        :param fitted: fit the projection even where the identity would fit its shape.
        :param memory: bytes that the teacher's outputs may take; 0 to compute them anew in every epoch.
        """
        self.task = batches.task
        self.partly = batches.partly
        self.settings = settings
        self.label_weight = settings.label_weight
        self.labels = set(label_names(student))
        self.compares_vectors = self.task == "embedding" and (teacher is None or task_of(teacher) == "embedding")
        self.projection: nn.Linear | None = None
        """From the student's states to the teacher's; learned along with the student."""
        self.teacher = self._taught_by(student, teacher, batches, memory)
        if self.teacher is not None and self.teacher.layers:
            self.projection = new_projection(student, self.teacher, batches, fitted=fitted)
        self.options = supported_kwargs(student, output_hidden_states=self.distils_layers, return_dict=True)

    def _taught_by(
        self, student: PreTrainedModel, teacher: PreTrainedModel | None, batches: Batches, memory: int
    ) -> Teacher | CachedTeacher | None:
        """Return who teaches: the teacher, or what one has put out in the rows; None where nothing is distilled."""
        settings, models = self.settings, [student] if teacher is None else [student, teacher]
        if not (settings.distill_logits_weight or settings.distill_layers_weight):
            return None
        # Stages have no states of one width.
        staged = any(heads_of_stages(encoder_config(each)) for each in models)
        states = bool(settings.distill_layers_weight) and not staged
        if teacher is None:
            return CachedTeacher(self.task, states, next(iter(batches))) if batches.taught else None
        depth = encoder_config(teacher).num_hidden_layers if states else 0
        layers = teacher_layers(depth, settings.distill_layers) if states else ()
        return Teacher(teacher, layers, self.task in TOKEN_AXIS, memory, class_order(student, teacher))

    @property
    def distils_layers(self) -> bool:
        """The student's hidden states are compared."""
        return self.projection is not None

    @property
    def matches_by_errors(self) -> bool:
        """Which student layers they are goes by the rows of a step."""
        return self.distils_layers and self.settings.distill_layer_match != "same-index"

    def cut(self, keep: Sequence[int]) -> None:
        """Go on with a student that was compacted to some hidden dimensions."""
        if self.projection is not None:
            weight, bias = self.projection.weight.detach(), self.projection.bias.detach()
            self.projection = _linear(weight[:, list(keep)], bias)

    def counts(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """Return how many rows or tokens of a batch each part of the loss is a mean of."""
        if REPEATED in batch:
            return dict.fromkeys(_PARTS, 0.0)
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
        rows = float(len(next(iter(batch.values()))))
        tokens = rows if ids is None else float(ids.numel())
        if ids is not None and mask is not None and mask.dim() == 2:
            tokens = float(mask.ne(0).sum())
        by_token = self.task in ("token-classification", "masked-lm")
        counted = _labels_counted(self.task, batch)
        values = (rows if counted is None else float(counted), tokens if by_token else rows, tokens)
        return dict(zip(_PARTS, values, strict=True))

    def __call__(
        self,
        model: nn.Module,
        batch: Mapping[str, Tensor],
        alive: Tensor | None,
        shares: Mapping[str, float] | None = None,
        agree: Agree = over_processes,
    ) -> dict[str, Tensor]:
        """Return the parts of the loss, and their weighted sum as `loss`.

        :param model: the student, possibly wrapped for several processes.
        :param batch: tensors [B, ...] on the student's device.
        :param alive: [layers] bool, the student's layers that still exist; None for all.
        :param shares: of this batch in each part of the loss of a step; None for a step of one batch.
        :param agree: takes the errors [S, Ls] of a batch with a share, by which layers are matched, returns the step's.
        """
        hidden_from_model = {ROWS, *CACHED, *(() if self.label_weight else self.labels)}
        inputs = {name: value for name, value in batch.items() if name not in hidden_from_model}
        output = model(**inputs, **self.options)
        return self.of(output, batch, alive, shares, agree)

    def of(
        self,
        output: Any,
        batch: Mapping[str, Tensor],
        alive: Tensor | None,
        shares: Mapping[str, float] | None = None,
        agree: Agree = over_processes,
    ) -> dict[str, Tensor]:
        """Return the same for outputs of the student, with `hidden_states` when `distils_layers`."""
        parts: dict[str, Tensor] = {}
        if self.label_weight:
            # The mean over no labels at all, such as those of a batch where nothing is masked, is not a number.
            counted = _labels_counted(self.task, batch)
            loss = _loss_of_numbers(self.task, output, batch) if self.partly and self.task in NUMBERS else output.loss
            parts["label_loss"] = loss if counted is None else torch.where(counted > 0, loss, 0.0)
        if self.teacher is not None:
            parts.update(self._teacher_parts(self.teacher, output, batch, alive, shares, agree))
        if shares is not None:
            parts = {name: shares[name] * value for name, value in parts.items()}
        settings = self.settings
        values = (self.label_weight, settings.distill_logits_weight, settings.distill_layers_weight)
        weights = dict(zip(_PARTS, values, strict=True))
        total = torch.stack([weights[name] * value.float() for name, value in parts.items()]).sum()
        return {**parts, "loss": total}

    def remember(self, student: PreTrainedModel, batches: Batches, count: int) -> None:
        """Fill the teacher's memory from the batches that were taken first, over all epochs, as it was filled then.

        Its outputs depend, in the last digits, on what rows were padded to.
        """
        if not isinstance(self.teacher, Teacher) or not self.teacher.memory:
            return
        for epoch in range(-(-count // len(batches))):
            for batch in itertools.islice(batches.epoch(epoch), count - epoch * len(batches)):
                if not self.teacher.knows(batch[ROWS]):
                    self.teacher.outputs(to_model(model_inputs(batch, student), student), batch[ROWS])

    def _teacher_parts(
        self,
        teacher: Teacher | CachedTeacher,
        output: Any,
        batch: Mapping[str, Tensor],
        alive: Tensor | None,
        shares: Mapping[str, float] | None,
        agree: Agree,
    ) -> dict[str, Tensor]:
        inputs = {name: value for name, value in batch.items() if name != ROWS and name not in self.labels}
        theirs, targets = teacher.outputs(inputs, batch.get(ROWS))
        mask = batch.get("attention_mask")
        parts: dict[str, Tensor] = {}
        ours = predictions(output)
        # Where widths differ, vectors of embeddings compare by their similarities, and states by a projection.
        alike = (theirs and self.compares_vectors) or [part.shape for part in ours] == [part.shape for part in theirs]
        if alike and self.settings.distill_logits_weight:
            parts["logits_loss"] = logit_loss(
                ours,
                theirs,
                temperature=self.settings.distill_temperature,
                kind=self.task,
                mask=mask if mask is not None and ours[0].dim() > 1 and ours[0].shape[:2] == mask.shape else None,
                pooling=self.settings.embedding_pooling,
            )
        if self.projection is not None:
            states = [each.flatten(1, -2) for each in output.hidden_states[1:]]
            parts["layers_loss"] = layerwise_loss(
                states,
                dict(zip(teacher.layers, targets, strict=True)),
                self.projection,
                how=self.settings.distill_layer_match,
                mask=mask if mask is not None and mask.shape == states[0].shape[:2] else None,
                alive=alive,
                teacher_depth=teacher.depth,
                agree=None if shares is None else lambda errors: agree(shares["layers_loss"] * errors),
            )
        if not parts:
            raise TrainingError(
                "the teacher's outputs cannot be compared with the student's, and the layers are not distilled: "
                "set distill_logits_weight or distill_layers_weight above 0"
            )
        return parts


def _labels_counted(task: Task, batch: Mapping[str, Tensor]) -> Tensor | None:
    """Return how many labels of a batch count in the model's loss, a scalar; None where all do."""
    if task == "question-answering" and "input_ids" in batch:
        length = batch["input_ids"].shape[1]
        starts, ends = batch["start_positions"] < length, batch["end_positions"] < length
        return torch.where(starts.any() & ends.any(), starts.sum() + ends.sum(), 0)
    if task in ("classification", "multiple-choice", "token-classification", "masked-lm") and "labels" in batch:
        return (batch["labels"] != IGNORED).sum()
    if task in NUMBERS and "labels" in batch:
        return (batch["labels"] != UNLABELLED).reshape(len(batch["labels"]), -1).all(-1).sum()
    return None


def _loss_of_numbers(task: Task, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the loss that transformers computes from labels that are numbers, of the rows that have some."""
    labels = batch["labels"]
    known = labels != UNLABELLED
    values, labels = predictions(output)[0].reshape(labels.shape), labels.masked_fill(~known, 0.0)
    if task == "regression":
        losses = F.mse_loss(values, labels.to(values.dtype), reduction="none")
    else:
        losses = F.binary_cross_entropy_with_logits(values, labels.to(values.dtype), reduction="none")
    return losses.masked_fill(~known, 0.0).sum() / known.sum().clamp(min=1)


@torch.no_grad()
def new_projection(
    student: PreTrainedModel, teacher: Teacher | CachedTeacher, batches: Batches, *, fitted: bool = False
) -> nn.Linear:
    """Return the linear map from a student's states to a teacher's: the identity where they match.

    A student of other or fewer dimensions or layers has no identity to start from: its last states are then fitted to
    the teacher's on a few batches, by ridge regression with an intercept in float64.

    :param fitted: fit it in any case, because the student has changed since they matched.
    """
    width, wanted = hidden_width(student), teacher.width
    layers = encoder_config(student).num_hidden_layers
    if not fitted and width == wanted and teacher.num_layers in (layers, None):
        return hidden_projection(width, wanted).to(student.device)
    gram: Tensor | None = None
    with evaluating(student):
        for batch in itertools.islice(batches, _FIT_BATCHES):
            batch = {name: value.to(student.device) for name, value in batch.items()}
            inputs = model_inputs(batch, student)
            seen = {name: value for name, value in batch.items() if name in inputs or name in CACHED}
            ours, theirs = last_states(student, inputs), teacher.last_states(seen)
            mask = inputs.get("attention_mask")
            if mask is not None and mask.shape == ours.shape[:2]:
                ours, theirs = ours[mask.bool()], theirs[mask.bool()]
            ours, theirs = ours.flatten(0, -2).double(), theirs.flatten(0, -2).double()
            joined = torch.cat([ours, ours.new_ones(len(ours), 1), theirs], dim=1)
            gram = joined.T @ joined if gram is None else gram + joined.T @ joined
    assert gram is not None
    inner, cross = gram[: width + 1, : width + 1], gram[: width + 1, width + 1 :]
    ridge = _RIDGE * inner.diagonal().mean() * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
    solution = torch.linalg.solve(inner + ridge, cross).T.float()
    return _linear(solution[:, :-1], solution[:, -1])


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """Return a linear layer with these values, in float32."""
    layer = nn.Linear(weight.shape[1], weight.shape[0]).to(weight.device)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer

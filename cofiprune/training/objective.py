"""The loss of a step: labels, the teacher's answers, and the states of its layers, each by its weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cofiprune.batches import ROWS
from cofiprune.distillation import PredictionKind, layerwise_loss, logit_loss, predictions
from cofiprune.errors import TrainingError
from cofiprune.tasks import Task, label_names
from cofiprune.training.config import PruneConfig
from cofiprune.training.teacher import Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREDICTION_OF: Mapping[Task, PredictionKind] = {
    "classification": "classification",
    "multiple-choice": "classification",
    "multi-label": "multi-label",
    "regression": "regression",
    "token-classification": "token-classification",
    "masked-lm": "masked-lm",
    "question-answering": "question-answering",
    "embedding": "embedding",
    "other": "regression",
}
TOKEN_AXIS: tuple[Task, ...] = ("token-classification", "masked-lm", "question-answering", "embedding")
"""Tasks whose predictions have a token axis."""


class Objective:
    """Computes the loss of a batch for a student, with or without a teacher."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Teacher | None,
        projection: nn.Linear | None,
        task: Task,
        config: PruneConfig,
        *,
        labelled: bool,
    ) -> None:
        self.teacher = teacher
        self.projection = projection
        self.task = task
        self.config = config
        default = 1.0 if teacher is None else 0.5
        self.label_weight = (default if config.label_weight is None else config.label_weight) if labelled else 0.0
        self.labels = set(label_names(student))
        self.distils_layers = teacher is not None and projection is not None

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], alive: Tensor | None) -> dict[str, Tensor]:
        """Return the parts of the loss, unweighted, and their weighted sum as `loss`.

        :param model: the student, possibly wrapped for several processes.
        :param batch: tensors [B, ...] on the student's device.
        :param alive: [layers] bool, the student's layers that still exist; None for all.
        """
        hidden_from_model = {ROWS} if self.label_weight else {ROWS, *self.labels}
        inputs = {name: value for name, value in batch.items() if name not in hidden_from_model}
        output = model(**inputs, output_hidden_states=self.distils_layers, return_dict=True)
        parts: dict[str, Tensor] = {}
        if self.label_weight:
            parts["label_loss"] = output.loss
        if self.teacher is not None:
            parts.update(self._teacher_parts(output, batch, alive))
        weights = {
            "label_loss": self.label_weight,
            "logits_loss": self.config.distill_logits_weight,
            "layers_loss": self.config.distill_layers_weight,
        }
        total = torch.stack([weights[name] * value.float() for name, value in parts.items()]).sum()
        return {**parts, "loss": total}

    def _teacher_parts(self, output: Any, batch: Mapping[str, Tensor], alive: Tensor | None) -> dict[str, Tensor]:
        assert self.teacher is not None
        inputs = {name: value for name, value in batch.items() if name != ROWS and name not in self.labels}
        answers = self.teacher.answer(inputs, batch.get(ROWS))
        mask = batch.get("attention_mask")
        parts: dict[str, Tensor] = {}
        ours, theirs = predictions(output), answers.predictions
        # An encoder without a head predicts its states; when hidden dimensions or widths differ, only the
        # layer loss, which maps one to the other, can compare them.
        if [part.shape for part in ours] == [part.shape for part in theirs] and self.config.distill_logits_weight:
            parts["logits_loss"] = logit_loss(
                ours,
                theirs,
                temperature=self.config.distill_temperature,
                kind=_PREDICTION_OF[self.task],
                mask=self._mask_for(ours[0], mask),
            )
        if self.distils_layers:
            assert self.projection is not None
            states = output.hidden_states[1:]
            parts["layers_loss"] = layerwise_loss(
                states,
                dict(zip(self.teacher.layers, answers.states, strict=True)),
                self.projection,
                how=self.config.distill_layer_match,
                mask=mask if mask is not None and mask.shape == states[0].shape[:2] else None,
                alive=alive,
                teacher_depth=self.teacher.depth,
                reduction="sum",
            )
        if not parts:
            raise TrainingError(
                "the teacher's answers cannot be compared with the student's, and the layers are not distilled: "
                "set distill_logits_weight or distill_layers_weight above 0"
            )
        return parts

    @staticmethod
    def _mask_for(prediction: Tensor, mask: Tensor | None) -> Tensor | None:
        """The attention mask where the prediction has a token axis; None where it has not."""
        if mask is None or prediction.dim() < 2 or prediction.shape[:2] != mask.shape:
            return None
        return mask

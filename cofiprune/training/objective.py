"""The loss of a step: labels, the teacher's answers, and the states of its layers, each by its weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cofiprune.data.batches import ROWS
from cofiprune.data.tasks import IGNORED, Task, label_names, supported_kwargs
from cofiprune.distillation import PredictionKind, layerwise_loss, logit_loss, predictions
from cofiprune.errors import TrainingError
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


def label_weight(config: PruneConfig, *, taught: bool, labelled: bool) -> float:
    """Weight of the loss on the labels in a run with or without a teacher and labels."""
    if not labelled:
        return 0.0
    if config.label_weight is None:
        return 0.5 if taught else 1.0
    return config.label_weight


def counts_labels(task: Task, batch: Mapping[str, Tensor]) -> Tensor | None:
    """Whether any label of a batch counts in the model's loss, a scalar bool; None where all do."""
    if task == "question-answering" and "input_ids" in batch:
        length = batch["input_ids"].shape[1]
        return (batch["start_positions"] < length).any() & (batch["end_positions"] < length).any()
    if task in ("classification", "multiple-choice", "token-classification", "masked-lm") and "labels" in batch:
        return (batch["labels"] != IGNORED).any()
    return None


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
        used = bool(config.distill_logits_weight or config.distill_layers_weight)
        self.teacher = teacher if used else None
        self.projection = projection
        self.task = task
        self.config = config
        self.label_weight = label_weight(config, taught=teacher is not None, labelled=labelled)
        self.labels = set(label_names(student))
        self.distils_layers = teacher is not None and projection is not None
        self.options = supported_kwargs(student, output_hidden_states=self.distils_layers, return_dict=True)

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], alive: Tensor | None) -> dict[str, Tensor]:
        """Return the parts of the loss, unweighted, and their weighted sum as `loss`.

        :param model: the student, possibly wrapped for several processes.
        :param batch: tensors [B, ...] on the student's device.
        :param alive: [layers] bool, the student's layers that still exist; None for all.
        """
        hidden_from_model = {ROWS} if self.label_weight else {ROWS, *self.labels}
        inputs = {name: value for name, value in batch.items() if name not in hidden_from_model}
        output = model(**inputs, **self.options)
        return self.of(output, batch, alive)

    def of(self, output: Any, batch: Mapping[str, Tensor], alive: Tensor | None) -> dict[str, Tensor]:
        """Return the same for what the student has answered, with `hidden_states` when `distils_layers`."""
        parts: dict[str, Tensor] = {}
        if self.label_weight:
            # The mean over no labels at all, such as those of a batch where nothing is masked, is not a number.
            counted = counts_labels(self.task, batch)
            parts["label_loss"] = output.loss if counted is None else torch.where(counted, output.loss, 0.0)
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

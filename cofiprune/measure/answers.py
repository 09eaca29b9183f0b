"""Scores of anything that answers batches as a model does, such as an exported file: by labels, and by a reference.

Agreement is the task's own metric with the answers of a reference in the place of labels: the share of rows, tokens or
spans on which both say the same; for numbers the correlation, for an encoder without a head the mean cosine of its
vectors. So rows without labels can be scored too.

Shapes: B rows, T tokens, H numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cofiprune.data.batches import Batch, Batches
from cofiprune.data.prepare import prepare
from cofiprune.data.tasks import IGNORED, Task
from cofiprune.errors import DataError, SettingsError, suggest
from cofiprune.measure.evaluation import ComputeMetrics, Metrics, OwnMetrics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Answer = Callable[[Batch], Mapping[str, Tensor]]
"""Outputs of a batch, by name."""
_METRICS: Mapping[Task, str] = {
    "classification": "accuracy",
    "token-classification": "accuracy",
    "masked-lm": "accuracy",
    "multiple-choice": "accuracy",
    "multi-label": "f1",
    "question-answering": "span_accuracy",
    "regression": "pearson",
}
"""The number in which a task's answers are compared; of other tasks, the cosine of vectors."""


@dataclass(frozen=True)
class Score:
    """What answers are worth; the higher the better, 1 at best."""

    value: float
    """By labels where rows have them, by agreement otherwise."""
    agreement: float


@dataclass(eq=False)
class Scorer:
    """Rows, and the answers of a reference to them."""

    batches: Batches
    metric: str
    """What is scored: a metric of the task, or agreement."""
    reference: Score
    _answers: Sequence[Batch] = field(repr=False)
    """For each batch, the reference's answers in the form of labels, or its vectors [B, H]."""
    _own: Callable[[], OwnMetrics] = field(repr=False)
    """Metrics of the user's own, anew."""

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        dataset: Any,
        reference: Answer,
        *,
        compute_metrics: ComputeMetrics | None = None,
        own_metric: str | None = None,
        batch_size: int = 32,
    ) -> Scorer:
        """Read rows as the model's data, and answer them by the reference.

        :param dataset: as in `evaluate`; labels may be missing.
        :param compute_metrics: as in `evaluate`: the score is then a number of it.
        :param own_metric: its name; may be left out where it is the only one.
        :raises DataError: when the data does not fit the model.
        :raises SettingsError: when there is no number of that name.
        """
        batches = prepare(dataset, model, batch_size=batch_size, need_labels=False, name="dataset")
        metric = _METRICS.get(batches.task)
        own, answers = OwnMetrics(compute_metrics, model), []
        for batch in batches:
            outputs = reference(batch)
            own.add(outputs, batch)
            answers.append(
                {"vectors": _vectors(outputs, batch)} if metric is None else _as_labels(batches.task, outputs, batch)
            )
        name = metric if batches.labelled and metric else "agreement"
        if compute_metrics is not None:
            name = _chosen(own_metric, own.result(batches))
        scorer = cls(batches, name, Score(1.0, 1.0), answers, partial(OwnMetrics, compute_metrics, model))
        scorer.reference = scorer.score(reference)
        return scorer

    def score(self, answer: Answer, only: Collection[int] | None = None) -> Score:
        """Score the answers to all rows, or to those of some batches; metrics of the user's own are of all rows."""
        by_label, by_reference, own = Metrics(self.batches.task), Metrics(self.batches.task), self._own()
        cosines = []
        for index, (batch, expected) in enumerate(zip(self.batches, self._answers, strict=True)):
            if only is not None and not own.wanted and index not in only:
                continue
            outputs = answer(batch)
            own.add(outputs, batch)
            if "vectors" in expected:
                cosines.append(torch.cosine_similarity(_vectors(outputs, batch), expected["vectors"]))
                continue
            by_reference.add(outputs, {**batch, **expected})
            if self.batches.labelled:
                by_label.add(outputs, batch)
        alike = torch.cat(cosines).mean().item() if cosines else by_reference.result()[_METRICS[self.batches.task]]
        values = {**by_label.result(), **own.result(self.batches), "agreement": alike}
        return Score(values[self.metric], alike)


def _chosen(name: str | None, computed: Mapping[str, float]) -> str:
    """Return the name of the number that is the score.

    :raises SettingsError: when it is not there, or open.
    """
    if name is None and len(computed) == 1:
        return next(iter(computed))
    if name is None or name not in computed:
        asked = (
            "metric= names the one that counts." if name is None else f"There is no {name!r}.{suggest(name, computed)}"
        )
        raise SettingsError(f"compute_metrics returns {', '.join(computed) or 'nothing'}. {asked}")
    return name


def _as_labels(task: Task, outputs: Mapping[str, Tensor], batch: Batch) -> Batch:
    """Write a model's answers as the labels that would call them right."""
    mask = batch.get("attention_mask")
    if task == "question-answering":
        ends = {name: outputs[f"{name}_logits"] for name in ("start", "end")}
        if mask is not None:
            ends = {name: logits.masked_fill(mask == 0, -torch.inf) for name, logits in ends.items()}
        return {f"{name}_positions": logits.argmax(-1) for name, logits in ends.items()}
    logits = outputs["logits"]
    if task == "regression":
        return {"labels": logits}
    if task == "multi-label":
        return {"labels": (logits > 0).float()}
    labels = logits.argmax(-1)
    per_token = task in ("token-classification", "masked-lm")
    return {"labels": labels.masked_fill(mask == 0, IGNORED) if per_token and mask is not None else labels}


def _vectors(outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """Return one vector for each row, [B, H]: the mean of the states of its tokens, or the first output as it is."""
    first = next(iter(outputs.values()), None)
    if first is None or first.dim() < 2:
        raise DataError("there is nothing to compare: the outputs hold no vectors")
    mask = batch.get("attention_mask")
    if first.dim() == 3 and mask is not None and mask.shape == first.shape[:2]:
        weights = mask.unsqueeze(-1).to(first.dtype)
        return (first * weights).sum(1) / weights.sum(1).clamp(min=1)
    return first.flatten(1)

"""Loss and metrics of a model on a data set.

A task's own metrics are counted batch by batch on the model's device, and read back at the end, so that no batch waits
for the previous one. Predictions are collected only for `compute_metrics`, which gets them as transformers' Trainer
would give them.

Shapes: B rows, T tokens, C classes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cofiprune.data.batches import Batch, Batches, RowBatches, to_model
from cofiprune.data.prepare import Collator, prepare
from cofiprune.data.reading import Reading
from cofiprune.data.rows import pad
from cofiprune.data.tasks import IGNORED, Task
from cofiprune.data.tasks import label_names as labels_of
from cofiprune.errors import DataError, located, names_checked
from cofiprune.hooks import reading, same_random_state
from cofiprune.whole import Whole

if TYPE_CHECKING:
    from transformers import EvalPrediction, PreTrainedModel

ComputeMetrics = Callable[["EvalPrediction"], Mapping[str, float]]
Preprocess = Callable[[Any, Any], Any]
_NOT_PREDICTIONS = ("loss", "hidden_states", "attentions", "past_key_values")


@names_checked
def evaluate(  # noqa: PLR0913  # its arguments are flat, as those of prune
    model: PreTrainedModel,
    dataset: Any,
    *,
    compute_metrics: ComputeMetrics | None = None,
    batch_size: int = 32,
    data_collator: Collator | None = None,
    preprocess_logits_for_metrics: Preprocess | None = None,
    device: torch.device | str | None = None,
    tokenizer: Any = None,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    label_names: Sequence[str] | None = None,
    max_length: int | None = None,
) -> dict[str, float]:
    """Return the loss of a model on a data set, the metrics of its task, and those of `compute_metrics`.

    Classification gives `accuracy`; regression `mse` and, for one number per row, `pearson`; multi-label
    classification `accuracy` and `f1` over all decisions; token classification `accuracy` over the tokens whose
    label is not -100; question answering `start_accuracy`, `end_accuracy` and `span_accuracy` (both right); masked
    language modelling `accuracy` and `perplexity`.

    :param dataset: as in `prune`: rows of text or of tokens, or a DataLoader.
    :param compute_metrics: takes a `transformers.EvalPrediction` with numpy arrays in the order of the rows, padded
        with -100 where batches differ in length, as the Trainer gives it; what it returns wins over our own.
    :param preprocess_logits_for_metrics: (logits, labels) -> what is kept for `compute_metrics`, as in the Trainer.
    :param device: run there and bring the model back afterwards; the model's own device by default.
    :param tokenizer: for rows of text, with the arguments after it, as in `prune`.
    :raises DataError: when the data does not fit the model, or there is nothing to measure.
    """
    reading = Reading(tokenizer, text_column, text_pair_column, label_column, label_names, max_length)
    whole = Whole.of(model)
    model, (dataset, data_collator) = whole.model, whole.data(reading, data_collator, dataset=dataset)
    with same_random_state():
        size, collator = batch_size, data_collator
        batches = prepare(dataset, model, batch_size=size, collator=collator, need_labels=False, name="the data set")
    if not batches.labelled and compute_metrics is None:
        expected = " and ".join(map(repr, labels_of(model))) or "labels (it has no head)"
        raise DataError(
            f"there is nothing to measure: {type(model).__name__} takes {expected}, and the rows have none that count"
        )
    home = model.device
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    try:
        return evaluate_batches(model, batches, compute_metrics, preprocess_logits_for_metrics)
    finally:
        if device is not None:
            model.to(home)  # type: ignore[arg-type]


def evaluate_batches(
    model: PreTrainedModel,
    batches: Batches,
    compute_metrics: ComputeMetrics | None = None,
    preprocess_logits_for_metrics: Preprocess | None = None,
) -> dict[str, float]:
    """Evaluate on batches that `cofiprune.data.prepare` made; the rest is as in `evaluate`."""
    metrics = Metrics(batches.task)
    kept: list[tuple[Any, Any]] = []
    with reading(model), torch.inference_mode():
        for batch in batches:
            batch = to_model(batch, model)
            outputs = model(**batch)
            if batches.labelled:
                metrics.add(outputs, batch)
            if compute_metrics is not None:
                kept.append(_kept(outputs, batch, model, preprocess_logits_for_metrics))
    found = metrics.result()
    if compute_metrics is not None:
        order = None
        if isinstance(batches, RowBatches):
            order = np.argsort([index for indices in batches.indices() for index in indices])
        predictions, labels = (_joined(parts, order) for parts in zip(*kept, strict=True))
        with same_random_state():
            found.update(_computed(compute_metrics, predictions, labels))
    return found


class Metrics:
    """Loss and metrics over batches: `add` each, then read the `result`."""

    def __init__(self, task: Task) -> None:
        self.task: Task = task
        self._counts: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def add(self, outputs: Any, batch: Mapping[str, Tensor]) -> None:
        """Count a batch.

        :param outputs: of a transformers model that was given labels.
        """
        counts = _counted(self.task, outputs, batch)
        weight = counts.pop("weight")
        loss = outputs.get("loss")
        if loss is not None:
            # The mean over no labels at all is not a number; it has no weight either.
            counts["loss"] = torch.where(weight > 0, loss.float() * weight, 0.0)
            counts["loss_weight"] = weight
        for name, value in counts.items():
            self._counts[name].append(value)
        if self.task == "regression":
            self._pairs.append((outputs["logits"].detach().float(), batch["labels"].float()))

    def result(self) -> dict[str, float]:
        """Return the metrics by name."""
        sums = {name: torch.stack(values).cpu().double().sum().item() for name, values in self._counts.items()}
        found: dict[str, float] = {}
        if "loss" in sums:
            found["loss"] = _ratio(sums["loss"], sums["loss_weight"])
        for name in ("accuracy", "start_accuracy", "end_accuracy", "span_accuracy"):
            if f"{name}_right" in sums:
                found[name] = _ratio(sums[f"{name}_right"], sums[f"{name}_of"])
        if self.task == "multi-label":
            found["f1"] = _ratio(2 * sums["both"], sums["predicted"] + sums["true"])
        if self.task == "masked-lm" and "loss" in found:
            found["perplexity"] = math.exp(min(found["loss"], 700.0))
        if self._pairs:
            found.update(_regression(self._pairs))
        return found


def _kept(outputs: Any, batch: Batch, model: PreTrainedModel, preprocess: Preprocess | None) -> Any:
    """Predictions and labels of a batch, on the CPU, nested as the Trainer nests them."""
    from transformers.trainer_pt_utils import nested_numpify

    ignored = {*_NOT_PREDICTIONS, *(getattr(model.config, "keys_to_ignore_at_inference", None) or ())}
    predictions: Any = tuple(value for name, value in outputs.items() if name not in ignored)
    predictions = predictions[0] if len(predictions) == 1 else predictions
    labels: Any = tuple(batch[name] for name in labels_of(model) if name in batch)
    labels = (labels[0] if len(labels) == 1 else labels) if labels else None
    if preprocess is not None:
        predictions = preprocess(predictions, labels)
    return tuple(None if part is None else nested_numpify(part) for part in (predictions, labels))  # type: ignore[no-untyped-call]


def _computed(compute: ComputeMetrics, predictions: Any, labels: Any) -> dict[str, float]:
    from transformers import EvalPrediction

    with located("compute_metrics: "):
        result = compute(EvalPrediction(predictions=predictions, label_ids=labels))
    if not isinstance(result, Mapping):
        raise DataError(f"compute_metrics must return a dict of numbers, not {type(result).__name__}")
    return {str(name): float(value) for name, value in result.items()}


def _joined(parts: Sequence[Any], order: Any) -> Any:
    """Concatenate the parts of all batches, rows in their own order, padded with -100 to a common shape."""
    if parts[0] is None:
        return None
    if isinstance(parts[0], tuple | list):
        return tuple(_joined(each, order) for each in zip(*parts, strict=True))
    joined = pad([row for part in parts for row in part], IGNORED)
    return joined if order is None else joined[order]


def _counted(task: Task, outputs: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Count a batch: scalar tensors to be summed over batches, and its `weight` in the mean loss."""
    logits, labels = outputs.get("logits"), batch.get("labels")
    if task == "question-answering":
        return _spans(outputs, batch)
    if labels is None or logits is None or task in ("other", "embedding", "regression"):
        first = next(iter(batch.values())) if labels is None else labels
        return {"weight": torch.tensor(len(first), device=first.device)}
    if task == "multi-label":
        predicted, true = logits > 0, labels.view_as(logits) > 0.5
        counts = {"both": (predicted & true).sum(), "predicted": predicted.sum(), "true": true.sum()}
        sizes = {"weight": len(labels), "accuracy_of": true.numel()}
        counts |= {name: torch.tensor(size, device=labels.device) for name, size in sizes.items()}
        return {**counts, "accuracy_right": (predicted == true).sum()}
    predicted = logits.argmax(-1)
    labels = labels.view_as(predicted)
    counts_for = labels != IGNORED
    right = ((predicted == labels) & counts_for).sum()
    return {"weight": counts_for.sum(), "accuracy_right": right, "accuracy_of": counts_for.sum()}


def _spans(outputs: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Spans [B] against logits [B, T]; positions past the end of the batch are left out, as in the loss."""
    found: dict[str, Tensor] = {}
    right, asked = [], []
    mask = batch.get("attention_mask")
    for end in ("start", "end"):
        logits: Tensor = outputs[f"{end}_logits"]
        if mask is not None:
            logits = logits.masked_fill(mask == 0, -torch.inf)  # the padding holds no span
        position = batch[f"{end}_positions"].view(-1)
        asked.append(position < logits.shape[1])
        right.append((logits.argmax(-1) == position) & asked[-1])
        found[f"{end}_accuracy_right"] = right[-1].sum()
        found[f"{end}_accuracy_of"] = asked[-1].sum()
    both = asked[0] & asked[1]
    found["span_accuracy_right"] = (right[0] & right[1]).sum()
    found["span_accuracy_of"] = both.sum()
    found["weight"] = both.sum()
    return found


def _regression(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    predicted = torch.cat([p.reshape(len(p), -1) for p, _ in pairs]).double().cpu().numpy()
    true = torch.cat([t.reshape(len(t), -1) for _, t in pairs]).double().cpu().numpy()
    found = {"mse": float(((predicted - true) ** 2).mean())}
    if true.shape[1] == 1 and len(true) > 1:
        # Undefined for constant predictions or labels; 0 says that nothing was predicted.
        varied = predicted.std() * true.std() > 0
        found["pearson"] = float(np.corrcoef(predicted.T, true.T)[0, 1]) if varied else 0.0
    return found


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan

"""Loss and metrics of a model on a data set.

A task's own metrics are counted batch by batch on the model's device. Predictions are collected only for
`compute_metrics`, which gets them as transformers' Trainer would give them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cofiprune.data.batches import Batch, Batches, RowBatches, to_model
from cofiprune.data.prepare import Collator, prepare
from cofiprune.data.rows import pad
from cofiprune.data.tasks import IGNORED, label_names
from cofiprune.errors import DataError
from cofiprune.hooks import reading
from cofiprune.measure.metrics import Metrics

if TYPE_CHECKING:
    from transformers import EvalPrediction, PreTrainedModel

ComputeMetrics = Callable[["EvalPrediction"], Mapping[str, float]]
Preprocess = Callable[[Any, Any], Any]
_NOT_PREDICTIONS = ("loss", "hidden_states", "attentions", "past_key_values")


def evaluate(
    model: PreTrainedModel,
    dataset: Any,
    *,
    compute_metrics: ComputeMetrics | None = None,
    batch_size: int = 32,
    data_collator: Collator | None = None,
    preprocess_logits_for_metrics: Preprocess | None = None,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """Return the loss of a model on a data set, the metrics of its task, and those of `compute_metrics`.

    Classification gives `accuracy`; regression `mse` and, for one number per row, `pearson`; multi-label
    classification `accuracy` and `f1` over all decisions; token classification `accuracy` over the tokens whose
    label is not -100; question answering `start_accuracy`, `end_accuracy` and `span_accuracy` (both right); masked
    language modelling `accuracy` and `perplexity`.

    :param dataset: as in `prune`: rows that are dicts, or a DataLoader.
    :param compute_metrics: takes a `transformers.EvalPrediction` with numpy arrays in the order of the rows, padded
        with -100 where batches differ in length, as the Trainer gives it; what it returns wins over our own.
    :param preprocess_logits_for_metrics: (logits, labels) -> what is kept for `compute_metrics`, as in the Trainer.
    :param device: run there and bring the model back afterwards; the model's own device by default.
    :raises DataError: when the data does not fit the model, or there is nothing to measure.
    """
    batches = prepare(
        dataset, model, batch_size=batch_size, collator=data_collator, need_labels=False, name="the data set"
    )
    if not batches.labelled and compute_metrics is None:
        expected = " and ".join(map(repr, label_names(model))) or "labels (it has no head)"
        raise DataError(f"there is nothing to measure: {type(model).__name__} takes {expected}, which the rows lack")
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
        found.update(_computed(compute_metrics, predictions, labels))
    return found


def _kept(outputs: Any, batch: Batch, model: PreTrainedModel, preprocess: Preprocess | None) -> Any:
    """Predictions and labels of a batch, on the CPU, nested as the Trainer nests them."""
    from transformers.trainer_pt_utils import nested_numpify

    ignored = {*_NOT_PREDICTIONS, *(getattr(model.config, "keys_to_ignore_at_inference", None) or ())}
    predictions: Any = tuple(value for name, value in outputs.items() if name not in ignored)
    predictions = predictions[0] if len(predictions) == 1 else predictions
    labels: Any = tuple(batch[name] for name in label_names(model) if name in batch)
    labels = (labels[0] if len(labels) == 1 else labels) if labels else None
    if preprocess is not None:
        predictions = preprocess(predictions, labels)
    return tuple(None if part is None else nested_numpify(part) for part in (predictions, labels))  # type: ignore[no-untyped-call]


def _computed(compute: ComputeMetrics, predictions: Any, labels: Any) -> dict[str, float]:
    from transformers import EvalPrediction

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

"""Task of a model's head, by which labels, loss and metrics are chosen.

The task is read off the class (`BertForTokenClassification` and every subclass of it), the
configuration, and, where transformers itself decides by the labels, off one row. Images and audio do
not have tasks of their own: `ViTForImageClassification` classifies, whatever it reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Task = Literal[
    "classification",
    "regression",
    "multi-label",
    "token-classification",
    "question-answering",
    "masked-lm",
    "multiple-choice",
    "embedding",
    "other",
]
"""`embedding` is an encoder without a head; `other` a head whose labels are handed on unread."""
LABELS = ("labels", "start_positions", "end_positions", "next_sentence_label")
"""Names that labels go by in the models' forward."""
LABEL_COLUMNS = ("labels", "label", "label_ids", "gold_label", "is_duplicate", "Quality")
"""Names under which data sets hold what the models call `labels`, in the order in which they are looked for."""
IGNORED = -100
"""The label that every loss of transformers leaves out."""

_BY_ENDING: Mapping[str, Task] = {
    "ForSequenceClassification": "classification",
    "ForImageClassification": "classification",
    "ForAudioClassification": "classification",
    "ForVideoClassification": "classification",
    "ForNextSentencePrediction": "classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "masked-lm",
    "ForMultipleChoice": "multiple-choice",
}
_BY_PROBLEM_TYPE: Mapping[str, Task] = {
    "regression": "regression",
    "single_label_classification": "classification",
    "multi_label_classification": "multi-label",
}


def task_of(model: PreTrainedModel, row: Mapping[str, Any] | None = None) -> Task:
    """Return the task of a model's head.

    :param row: a row of its data; its labels tell a classifier with one label per row from one with several.
    """
    if model.base_model is model:
        return "embedding"
    names = [cls.__name__ for cls in type(model).__mro__]
    found = next((task for name in names if (task := task_by_name(name)) is not None), None)
    if found == "classification" and not _ends(names, "ForNextSentencePrediction"):
        return _by_labels(model, row)
    if found is None:
        return _BY_PROBLEM_TYPE.get(str(getattr(model.config, "problem_type", None)), "other")
    return found


def task_by_name(name: str) -> Task | None:
    """Return the task that the name of a model's class ends in."""
    return next((task for ending, task in _BY_ENDING.items() if name.endswith(ending)), None)


def classes_of(model: PreTrainedModel) -> int:
    """Number of classes that a model's head tells apart, for the tasks that have classes."""
    if _ends([cls.__name__ for cls in type(model).__mro__], "ForNextSentencePrediction"):
        return 2
    return outputs_of(model)


def outputs_of(model: PreTrainedModel) -> int:
    """Number of outputs of a model's head: classes, or numbers predicted."""
    labels: Any = model.config.num_labels
    return int(labels)


def label_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the labels in the model's forward, in its order; empty for a model that computes no loss."""
    return tuple(name for name in forward_names(model) if name in LABELS)


def forward_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the arguments of a model's forward; those of the model inside when it is wrapped (PEFT)."""
    return tuple(name for name in inspect.signature(_forward(model)).parameters if name != "self")


def supported_kwargs(model: PreTrainedModel, **options: Any) -> dict[str, Any]:
    """Return the options of a forward (`return_dict`, ...) that a model accepts: a model of one's own may lack some."""
    # Not those of a function inside a decorator: that may take an option itself and not hand it on.
    parameters = inspect.signature(_forward(model), follow_wrapped=False).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return options
    return {name: value for name, value in options.items() if name in parameters}


def _forward(model: PreTrainedModel) -> Callable[..., Any]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    forward: Callable[..., Any] = type(inner).forward
    return forward


def _ends(names: list[str], ending: str) -> bool:
    return any(name.endswith(ending) for name in names)


def _by_labels(model: PreTrainedModel, row: Mapping[str, Any] | None) -> Task:
    """Follow the order in which transformers chooses the loss of a sequence classifier."""
    stated = str(getattr(model.config, "problem_type", None))
    if stated in _BY_PROBLEM_TYPE:
        return _BY_PROBLEM_TYPE[stated]
    if outputs_of(model) == 1:
        return "regression"
    labels = None if row is None else row.get("labels")
    several = labels is not None and np.ndim(labels) > 0 and np.size(labels) > 1
    return "multi-label" if several else "classification"

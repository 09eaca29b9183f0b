"""Task and labels of a model's head: the task chooses loss and metrics.

The task is read off the class (`BertForTokenClassification` and every subclass of it), the
configuration, and, where transformers itself decides by the labels, off one row. Images and audio do
not have tasks of their own: `ViTForImageClassification` classifies, whatever it reads.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cofiprune.errors import DataError
from cofiprune.parts import encoder_within

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

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
INPUTS = ("input_ids", "pixel_values", "pixel_values_videos", "input_values", "input_features")
"""Inputs that can be made up."""
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
    names = _class_names(model)
    found = next((task for name in names if (task := task_by_name(name)) is not None), None)
    if found is None and model.base_model is model and not encoder_within(model):
        return "embedding"
    if found == "classification" and not any(name.endswith("ForNextSentencePrediction") for name in names):
        return _by_labels(model, row)
    if found is None:
        return _BY_PROBLEM_TYPE.get(str(getattr(model.config, "problem_type", None)), "other")
    return found


def main_input(model: PreTrainedModel) -> str:
    """Return the name of what a model mainly reads; some models state one that their forward does not have."""
    names = forward_names(model)
    stated: str = model.main_input_name
    return stated if stated in names else next((name for name in (*INPUTS, *names) if name in names), stated)


def task_by_name(name: str) -> Task | None:
    """Return the task that the name of a model's class ends in."""
    return next((task for ending, task in _BY_ENDING.items() if name.endswith(ending)), None)


def classes_of(model: PreTrainedModel) -> int:
    """Number of classes that a model's head tells apart, for the tasks that have classes."""
    if any(name.endswith("ForNextSentencePrediction") for name in _class_names(model)):
        return 2
    return outputs_of(model)


def outputs_of(model: PreTrainedModel) -> int:
    """Number of outputs of a model's head: classes, or numbers predicted."""
    return model.config.num_labels or 0


def class_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of a head's classes in the order of its outputs, in lower case; empty where they say nothing.

    Numbers, names that are given twice and those that transformers gives to classes without one say nothing, nor do
    those in the configuration of a model whose outputs are no classes: spans, words, choices or states.
    """
    if task_of(model) in ("embedding", "question-answering", "masked-lm", "multiple-choice"):
        return ()
    named = {int(index): str(label).strip().casefold() for index, label in (model.config.id2label or {}).items()}
    names = tuple(named[index] for index in sorted(named))
    unnamed = all(re.fullmatch(r"(label)?[\s_-]*\d+", name) for name in names)
    return () if unnamed or len(set(names)) != outputs_of(model) else names


def class_order(student: PreTrainedModel, teacher: PreTrainedModel) -> list[int] | None:
    """Return the place in a teacher's outputs of each class of a student, by name; None where it is the student's."""
    ours, theirs = class_names(student), class_names(teacher)
    return None if ours == theirs or set(ours) != set(theirs) else [theirs.index(name) for name in ours]


def label_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the labels in the model's forward, in its order; empty for a model that computes no loss."""
    return tuple(name for name in forward_names(model) if name in LABELS)


def forward_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the arguments of a model's forward; those of the model inside when it is wrapped (PEFT).

    A forward that takes any keyword takes those of the class above as well, to which it passes them.
    """
    names: dict[str, None] = {}
    for cls in type(_unwrapped(model)).__mro__:
        if "forward" in cls.__dict__:
            parameters = inspect.signature(cls.__dict__["forward"]).parameters.values()
            kinds = {parameter.kind for parameter in parameters}
            names.update(dict.fromkeys(each.name for each in parameters if each.kind not in _VARIABLE))
            if inspect.Parameter.VAR_KEYWORD not in kinds:
                break
    names.pop("self", None)
    return tuple(names)


def supported_kwargs(model: PreTrainedModel, **options: Any) -> dict[str, Any]:
    """Return the options of a forward (`return_dict`, ...) that a model accepts: a model of one's own may lack some."""
    # Not those of a function inside a decorator: that may take an option itself and not hand it on.
    parameters = inspect.signature(type(_unwrapped(model)).forward, follow_wrapped=False).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return options
    return {name: value for name, value in options.items() if name in parameters}


def _unwrapped(model: PreTrainedModel) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _class_names(model: PreTrainedModel) -> list[str]:
    return [cls.__name__ for cls in type(model).__mro__]


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


@dataclass(frozen=True)
class Labels:
    """Labels of a classifier: the classes that its head tells apart, or a number."""

    names: tuple[str, ...]
    """Of the classes, in the order of their ids; empty for a number as the label."""
    multi_label: bool = False

    @classmethod
    def of_model(cls, config: PretrainedConfig) -> Labels:
        """Return the labels that a configuration describes."""
        if config.num_labels == 1 or config.problem_type == "regression":
            return cls(())
        named = {int(index): str(label) for index, label in (config.id2label or {}).items()}
        names = tuple(named[index] for index in sorted(named))
        return cls(names, config.problem_type == "multi_label_classification")

    @classmethod
    def of_data(cls, labels: Sequence[Any], names: Sequence[str] = ()) -> Labels:
        """Return the labels that a head for this data needs.

        :param labels: as they stand in the training data.
        :param names: of the classes, in the order of their ids, when the user gives them.
        """
        labels = [label for label in labels if label is not None and label != ""]
        if labels and isinstance(labels[0], list):
            return cls(tuple(names) or _numbered(len(labels[0])), multi_label=True)
        if names:
            return cls(tuple(names))
        numbers = [_number(label) for label in labels]
        if any(value is None for value in numbers):
            return cls(tuple(sorted({str(label) for label in labels})))
        found = [value for value in numbers if value is not None]
        if not all(value.is_integer() for value in found):
            return cls(())
        if found and max(found) >= _MOST:
            raise DataError(
                f"a label is {max(found):.0f}, and classes are numbered from 0: pass names, or other numbers"
            )
        return cls(_numbered(max(2, 1 + int(max(found, default=1)))))

    @property
    def generic(self) -> bool:
        """True for classes with the names that transformers gives to those without."""
        return self.names == _numbered(len(self.names))

    def apply(self, config: PretrainedConfig) -> None:
        """Make a configuration describe a head for these labels."""
        config.num_labels = len(self.names) or 1
        if self.names:
            config.id2label = dict(enumerate(self.names))
            config.label2id = {name: index for index, name in enumerate(self.names)}
        config.problem_type = "multi_label_classification" if self.multi_label else None if self.names else "regression"

    @classmethod
    def name(cls, config: PretrainedConfig, names: Sequence[str]) -> None:
        """Write the names of a head's classes, in the order of their ids, into a configuration.

        :raises DataError: when they are not as many as its classes.
        """
        own = cls.of_model(config)
        if len(names) != len(own.names):
            raise DataError(f"label_names has {len(names)} names and the model {config.num_labels} labels")
        cls(tuple(names), own.multi_label).apply(config)

    def encode(self, labels: Sequence[Any], noun: str = "row") -> list[Any]:
        """Return labels, which may be names or numbers, as the ids or numbers that a head takes.

        :raises DataError: naming the first label that is none of these.
        """
        ids: dict[Any, int] = {name.casefold(): index for index, name in enumerate(self.names)}
        ids.update({name: index for index, name in enumerate(self.names)})
        return [self._encoded(label, ids, f"{noun} {index} (from 0)") for index, label in enumerate(labels)]

    def _encoded(self, label: Any, ids: Mapping[Any, int], where: str) -> Any:
        if isinstance(label, list):
            return label
        if label is None or label == "":
            raise DataError(f"{where} has no label")
        text = str(label)
        known_id = ids.get(text, ids.get(text.casefold()))
        if known_id is not None:
            return known_id
        value = _number(label)
        if value is None or (self.names and not value.is_integer()):
            known = f"among {', '.join(self.names[:8])}" if self.names else "a number, which this model predicts"
            hint = "; give their names in the order of their ids by label_names" if self.names and self.generic else ""
            raise DataError(f"{where}: label {text!r} is not {known}{hint}")
        return int(value) if self.names else value


_MOST = 1_000_000
"""Classes that labels without names may stand for."""


def _numbered(size: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{index}" for index in range(size))


def _number(label: Any) -> float | None:
    try:
        return float(label)
    except (TypeError, ValueError, OverflowError):
        return None

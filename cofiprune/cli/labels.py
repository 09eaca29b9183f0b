"""Labels as data files write them (names, numbers, lists) as the ids that a model's head takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cofiprune.errors import DataError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Head:
    """What a head of a classifier tells apart."""

    names: tuple[str, ...]
    """Of the classes, in the order of their ids; empty for a number as the label."""
    multi_label: bool = False

    @classmethod
    def of_model(cls, config: PretrainedConfig) -> Head:
        """The head that a configuration describes."""
        if config.num_labels == 1 or config.problem_type == "regression":
            return cls(())
        named = {int(index): str(label) for index, label in (config.id2label or {}).items()}
        names = tuple(named[index] for index in sorted(named))
        return cls(names, config.problem_type == "multi_label_classification")

    @classmethod
    def of_data(cls, labels: Sequence[Any], names: Sequence[str] = ()) -> Head:
        """The head for labels as they stand in the training data.

        :param names: of the classes, in the order of their ids, when the user gives them.
        """
        labels = [label for label in labels if label is not None and label != ""]
        if labels and isinstance(labels[0], list):
            size = len(labels[0])
            return cls(tuple(names) or _numbered(size), multi_label=True)
        if names:
            return cls(tuple(names))
        numbers = [_number(label) for label in labels]
        if any(value is None for value in numbers):
            return cls(tuple(sorted({str(label) for label in labels})))
        found = [value for value in numbers if value is not None]
        if any(value != int(value) for value in found):
            return cls(())
        return cls(_numbered(max(2, 1 + int(max(found, default=1)))))

    def apply(self, config: PretrainedConfig) -> None:
        """Make a configuration describe this head."""
        config.num_labels = len(self.names) or 1
        if self.names:
            config.id2label = dict(enumerate(self.names))
            config.label2id = {name: index for index, name in enumerate(self.names)}
        config.problem_type = "multi_label_classification" if self.multi_label else None if self.names else "regression"

    def encode(self, labels: Sequence[Any], where: str) -> list[Any]:
        """Return the labels as numbers.

        :param where: the file, for messages.
        :raises DataError: naming the first label that is none of this head's.
        """
        ids: dict[Any, int] = {name.casefold(): index for index, name in enumerate(self.names)}
        ids.update({name: index for index, name in enumerate(self.names)})
        return [self._encoded(label, ids, f"{where}, row {row} (from 0)") for row, label in enumerate(labels)]

    def _encoded(self, label: Any, ids: dict[Any, int], where: str) -> Any:
        if isinstance(label, list):
            return label
        if label is None or label == "":
            raise DataError(f"{where} has no label")
        text = str(label)
        if self.names and (text in ids or text.casefold() in ids):
            return ids[text] if text in ids else ids[text.casefold()]
        value = _number(label)
        if value is None or (self.names and value != int(value)):
            known = f"among {', '.join(self.names[:8])}" if self.names else "a number, which this model predicts"
            generic = self.names and self.names[0] == "LABEL_0"
            hint = "; give their names in the order of their ids by --label-names" if generic else ""
            raise DataError(f"{where}: label {text!r} is not {known}{hint}")
        return int(value) if self.names else value


def _numbered(size: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{index}" for index in range(size))


def _number(label: Any) -> float | None:
    try:
        return float(label)
    except (TypeError, ValueError):
        return None

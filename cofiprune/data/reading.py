"""What users pass as a data set: rows of tokens as they are, rows of text through a tokenizer, labels by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from cofiprune.data.files import load_rows
from cofiprune.data.mixed import Mixed
from cofiprune.data.rows import Source, as_rows
from cofiprune.data.streams import Stream, is_stream
from cofiprune.data.tasks import LABEL_COLUMNS, Labels, task_of
from cofiprune.data.text import TextColumns, collator_for, find_text_columns, tokenise
from cofiprune.errors import DataError, SettingsError, located

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_COLUMNS = ("text_column", "text_pair_column", "label_column")


@dataclass(frozen=True)
class Reading:
    """How rows of text are read; as the arguments of `prune`, `finetune` and `evaluate`."""

    tokenizer: Any = None
    """Of the model; None for rows of tokens."""
    text_column: str | None = None
    """Text, or first text of a pair; None for one of a known name."""
    text_pair_column: str | None = None
    label_column: str | None = None
    label_names: Sequence[str] | None = None
    """Names of the classes in the order of their ids, where the model's configuration has none."""
    max_length: int | None = None
    """Tokens after which a text is cut."""
    labelled: bool = True
    """Whether labels are read."""

    def check(self, model: PreTrainedModel) -> None:
        """Check the arguments, and write the names of classes into the model's configuration.

        :raises SettingsError: for something else than a tokenizer.
        :raises DataError: for another number of names than of classes.
        """
        if self.tokenizer is not None and not callable(self.tokenizer):
            raise SettingsError(
                f"tokenizer takes a tokenizer, such as AutoTokenizer.from_pretrained(...), not {self.tokenizer!r}"
            )
        if self.label_names is not None:
            names = [self.label_names] if isinstance(self.label_names, str) else self.label_names
            Labels.name(model.config, list(map(str, names)))

    def rows(self, dataset: Any, model: PreTrainedModel, name: str) -> Any:
        """Return rows of tokens with labels as ids; what is that already, and a DataLoader, as it is.

        :param dataset: as in `prune`, rows of text among them, or the name of a file of such rows.
        :param name: what messages call it.
        :raises DataError: when rows have no text of a known name, or a label that is none of the model's.
        """
        if isinstance(dataset, Mixed):
            return dataset.read(self, lambda reading, rows, what: reading.rows(rows, model, what), name)
        with located(f"{name}: "):
            rows = load_rows(dataset) if isinstance(dataset, str | Path) else dataset
            if rows is None or isinstance(rows, DataLoader):
                return rows
            if is_stream(rows):
                return Stream(rows, lambda chosen: self.rows(chosen, model, name))
            texts = as_rows(rows)
            if texts is not rows and self.tokenizer is None:
                raise DataError("texts need a tokenizer: pass tokenizer=...")
            source = Source(texts)
            first = source[0]
        columns = self._columns(first, model, name)
        if columns is None:
            return rows
        every = [source[index] for index in range(len(source))]
        return tokenise(every, self.tokenizer, model, columns=columns, max_length=self.max_length, where=name)

    def _columns(self, first: Mapping[str, Any], model: PreTrainedModel, name: str) -> TextColumns | None:
        """Return the columns to read; None for rows that a model takes as they are."""
        named = {column: getattr(self, column) for column in _COLUMNS}
        if not self.labelled:  # other files often have other columns
            named = {column: value if value in first else None for column, value in named.items()}
        labels = self.label_column is not None or any(isinstance(first.get(each), str) for each in LABEL_COLUMNS)
        if self.tokenizer is None and not (labels or any(named.values())):
            return None
        columns = find_text_columns(first, task_of(model), **named, where=name)
        if not self.labelled:
            columns = replace(columns, label=None)
        if columns.text is not None and self.tokenizer is None:
            raise DataError(f"{name}: the text in {columns.text!r} needs a tokenizer: pass tokenizer=...")
        return columns if columns.text is not None or labels else None

    def data(self, model: PreTrainedModel, collator: Any, **datasets: Any) -> tuple[Any, ...]:
        """Return data sets as rows of tokens, and what makes batches of them, where that is more than padding.

        :param datasets: by the names that messages call them; the first one decides on the collator.
        """
        self.check(model)
        rows = [self.rows(dataset, model, name) for name, dataset in datasets.items()]
        texts = self.tokenizer is not None and not isinstance(rows[0], DataLoader)
        return (*rows, collator_for(model, self.tokenizer) if collator is None and texts else collator)

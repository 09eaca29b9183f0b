"""`teach`: what a model puts out for rows, written beside them, so that students learn from the file.

The model then runs once, wherever it is, and need not fit beside the student. Rows are taken some hundreds at a time:
each such part is a file that is whole or not there, and a call that was cut off goes on with the next.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cofiprune.data.batches import RowBatches, model_inputs, to_model
from cofiprune.data.cached import CACHED, EMBEDDING, HIDDEN, LOGITS
from cofiprune.data.files import stream_rows
from cofiprune.data.mixed import Bare
from cofiprune.data.prepare import prepare
from cofiprune.data.reading import Reading
from cofiprune.data.rows import as_rows
from cofiprune.data.tables import ENDINGS, Array, join_parts, package, write_part
from cofiprune.data.tasks import Task, supported_kwargs, task_of
from cofiprune.distillation import Pooling, pooled, predictions, teacher_layers
from cofiprune.errors import CheckpointError, DataError, SettingsError, explained, located, names_checked, suggest
from cofiprune.files import checksum, read_sealed, write, write_sealed
from cofiprune.hooks import evaluating, same_random_state
from cofiprune.parts import encoder_config
from cofiprune.training.arguments import check_weights
from cofiprune.training.environment import Display
from cofiprune.training.identity import digest_of_data, digest_of_model
from cofiprune.training.objective import TOKEN_AXIS
from cofiprune.whole import PAIRS, SENTENCES, Whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Output = Literal["logits", "embedding", "hidden"]
OUTPUTS: Mapping[str, str] = {"logits": LOGITS, "embedding": EMBEDDING, "hidden": HIDDEN}
DTYPES = ("float16", "float32")
PART = 512
"""Rows of a part."""
Rows = Sequence[Mapping[str, Any]]


@names_checked
def teach(  # noqa: PLR0913  # its arguments are flat, as those of prune
    teacher: Any,
    dataset: Any,
    output: str | Path,
    *,
    outputs: Sequence[Output] | Output | None = None,
    layers: int = 1,
    dtype: Literal["float16", "float32"] = "float16",
    batch_size: int = 32,
    embedding_pooling: Pooling = "mean",
    tokenizer: Any = None,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    max_length: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write the rows of a data set with what a teacher puts out for them; `prune` and `finetune` learn from such rows.

    The file has the columns of the rows as they came, and `teacher_logits`, `teacher_embedding` or `teacher_hidden`.
    The file stands when it is whole; until then its parts are in a folder beside it, and the same call goes on with
    what is missing. No more than 512 rows are in memory at a time where they come from a file or a stream.

    :param teacher: a transformers model on any device, a `SentenceTransformer` or a `CrossEncoder`. The order of its
        classes must be that of the students'.
    :param dataset: rows as in `prune`, of text or of tokens, labelled or not; the name of a file; or any iterable.
    :param output: a file that ends in .parquet, which needs pyarrow, or .jsonl.
    :param outputs: among "logits", "embedding" and "hidden". None: logits of a model with a head, the embedding of one
        without.
    :param layers: number of layers whose states are written as "hidden", evenly spaced up to the last; `distill_layers`
        has the same choice.
    :param dtype: "float16" or "float32" of what is written.
    :param embedding_pooling: how an encoder without a head makes vectors, "mean" or "cls"; a `SentenceTransformer`
        has its own way.
    :param tokenizer: for rows of text, with the arguments after it as in `prune`. Outputs for tokens, and hidden
        states, are of use to students with the same tokenizer and `max_length`.
    :param overwrite: replace the file, and parts of another call.
    :raises SettingsError: for a wrong argument, or a file that is there.
    :raises DataError: when rows do not fit the teacher, or its outputs `dtype`.
    :raises CheckpointError: when the parts that are there are of another teacher, other rows or settings.
    """
    whole = Whole.of(teacher)
    reading = Reading(tokenizer, text_column, text_pair_column, max_length=max_length, labelled=False)
    with torch.inference_mode(False), same_random_state():
        reading.check(whole.model)
        check_weights(whole.model, "the teacher")
        wanted = _Wanted.of(whole, outputs, layers, dtype, embedding_pooling)
        file = _checked_file(output, overwrite=overwrite)
        settings = [repr(wanted), max_length, text_column, text_pair_column]
        parts = _Parts(file, {"teacher": digest_of_model(whole.model), "settings": list(map(str, settings))})
        parts.open(overwrite=overwrite)
        total = len(dataset) if hasattr(dataset, "__len__") and not isinstance(dataset, str | Path) else None
        display = Display(enabled=progress)
        with display, evaluating(whole.owner if whole.kind == SENTENCES else whole.model):
            display.begin("teach", total=total, done=0)
            number = 0
            for number, rows in enumerate(_chunks(_given(dataset, whole)), start=1):
                with located(f"from row {(number - 1) * PART} on: "):
                    parts.add(number, rows, partial(wanted.columns, rows, reading, batch_size))
                display.reach((number - 1) * PART + len(rows))
        parts.join(number)
    return file


@dataclass(frozen=True)
class _Wanted:
    """What is asked of a teacher."""

    whole: Whole
    task: Task
    outputs: tuple[str, ...]
    layers: tuple[int, ...]
    dtype: str
    pooling: Pooling

    def __repr__(self) -> str:
        return f"{self.outputs} {self.layers} {self.dtype} {self.pooling}"

    @classmethod
    def of(cls, whole: Whole, outputs: Any, layers: int, dtype: str, pooling: Any) -> _Wanted:
        """Check the arguments against the teacher.

        :raises SettingsError: when they do not fit.
        """
        task = task_of(whole.model)
        usual = "embedding" if task == "embedding" else "logits"
        chosen = (usual,) if outputs is None else (outputs,) if isinstance(outputs, str) else tuple(outputs)
        for name in chosen:
            if name not in OUTPUTS:
                raise SettingsError(f"outputs: {name!r} is none of {', '.join(OUTPUTS)}.{suggest(str(name), OUTPUTS)}")
            if name != usual and name != "hidden":
                raise SettingsError(f"outputs: a {type(whole.model).__name__} has no {name}; it has {usual} and hidden")
        if not chosen:
            raise SettingsError(f"outputs is empty; choose among {', '.join(OUTPUTS)}")
        for name, value, known in (("dtype", dtype, DTYPES), ("embedding_pooling", pooling, ("mean", "cls"))):
            if value not in known:
                raise SettingsError(f"{name} is {value!r}; it takes {' or '.join(map(repr, known))}")
        if "hidden" in chosen and not supported_kwargs(whole.model, output_hidden_states=True):
            raise SettingsError(f"{type(whole.model).__name__}.forward takes no output_hidden_states")
        depth = encoder_config(whole.model).num_hidden_layers if "hidden" in chosen else 1
        return cls(whole, task, tuple(dict.fromkeys(chosen)), teacher_layers(depth, layers), dtype, pooling)

    def columns(self, rows: Rows, reading: Reading, batch_size: int) -> dict[str, list[Array]]:
        """Return the columns of some rows."""
        if self.whole.kind == SENTENCES and "text" in rows[0]:  # each text once
            place = {text: number for number, text in enumerate(dict.fromkeys(row["text"] for row in rows))}
            found = self._columns([{"text": text} for text in place], reading, batch_size)
            return {name: [cells[place[row["text"]]] for row in rows] for name, cells in found.items()}
        return self._columns(rows, reading, batch_size)

    def _columns(self, rows: Rows, reading: Reading, batch_size: int) -> dict[str, list[Array]]:
        model = self.whole.model
        tokens, _ = self.whole.data(reading, None, dataset=rows)
        batches = prepare(Bare(tokens), model, batch_size=batch_size, need_labels=False, name="dataset")
        assert isinstance(batches, RowBatches)
        found: dict[str, list[Any]] = {OUTPUTS[name]: [None] * len(rows) for name in self.outputs}
        for numbers, batch in zip(batches.indices(), batches, strict=True):
            inputs = to_model(model_inputs(batch, model), model)
            with torch.no_grad():
                columns = self._of(model, inputs)
            for name, values in columns.items():
                for number, cell in zip(numbers, _cut(values, inputs, self._has_tokens(name)), strict=True):
                    found[name][number] = _narrowed(cell, self.dtype, number)
        return found

    def _has_tokens(self, name: str) -> bool:
        return name == HIDDEN or (name == LOGITS and self.task in TOKEN_AXIS)

    def _of(self, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the columns hold of a batch: the axis of tokens, where there is one, is the second."""
        hidden = supported_kwargs(model, output_hidden_states="hidden" in self.outputs, return_dict=True)
        output = model(**inputs, **hidden)
        predicted, found = predictions(output), {}
        if "logits" in self.outputs:
            found[LOGITS] = torch.stack(predicted, -1) if len(predicted) > 1 else predicted[0]
        if "embedding" in self.outputs:
            mask = inputs.get("attention_mask")
            sentences = self.whole.kind == SENTENCES
            found[EMBEDDING] = self.whole.vectors(inputs) if sentences else pooled(predicted[0], mask, self.pooling)
        if "hidden" in self.outputs:
            states = [output.hidden_states[layer + 1].flatten(1, -2) for layer in self.layers]
            found[HIDDEN] = states[0] if len(states) == 1 else torch.stack(states, 2)
        return found


def _cut(values: Tensor, inputs: Mapping[str, Tensor], has_tokens: bool) -> Iterator[Tensor]:
    """Give the rows of a batch without padding; of states of several layers, the layers come first."""
    mask = inputs.get("attention_mask")
    for index, row in enumerate(values.detach().cpu()):
        if has_tokens and mask is not None and mask.dim() == 2 and mask.shape[1] == row.shape[0]:
            row = row[: int(mask[index].nonzero().max()) + 1]
        yield row.transpose(0, 1) if has_tokens and row.dim() == 3 else row


def _narrowed(cell: Tensor, dtype: str, row: int) -> Array:
    values: Array = cell.float().numpy()
    with np.errstate(over="ignore"):
        found: Array = values.astype(dtype)
    if not np.isfinite(values).all():
        raise DataError(f"row {row}: the teacher puts out {values[~np.isfinite(values)][0]}, which is no finite number")
    if not np.isfinite(found).all():
        raise DataError(f"row {row}: {np.abs(values).max():g} is too large for {dtype}; pass dtype='float32'")
    return found


def _given(dataset: Any, whole: Whole) -> Iterator[Mapping[str, Any]]:
    """Give the rows of whatever was passed; for a SentenceTransformer each text is a row."""
    if isinstance(dataset, DataLoader):
        raise SettingsError("teach takes rows, not a DataLoader: its batches say nothing of the rows they are made of")
    if isinstance(dataset, str | Path):
        rows: Any = stream_rows(dataset)
    elif hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and not isinstance(dataset, Mapping):
        held = as_rows(dataset)
        rows = (held[index] for index in range(len(held)))
    elif hasattr(dataset, "__iter__") and not isinstance(dataset, Mapping):
        rows = iter(dataset)
    else:
        raise DataError(f"dataset takes rows, not a {type(dataset).__name__}")
    for index, row in enumerate(rows):
        if whole.kind is not None and not (isinstance(row, Mapping) and (whole.kind == PAIRS or "input_ids" in row)):
            texts = whole.texts(row, index)
            names = ("sentence1", "sentence2")
            yield from [dict(zip(names, texts, strict=False))] if whole.kind == PAIRS else ({"text": x} for x in texts)
        elif not isinstance(row, Mapping | str):
            raise DataError(f"row {index} is a {type(row).__name__}; rows are dicts, or texts")
        else:
            row = {"text": row} if isinstance(row, str) else row
            yield {name: value for name, value in row.items() if name not in CACHED}


def _chunks(rows: Iterator[Mapping[str, Any]]) -> Iterator[Rows]:
    found = False
    while chunk := list(itertools.islice(rows, PART)):
        found = True
        yield chunk
    if not found:
        raise DataError("there are no rows in it")


def _checked_file(output: str | Path, *, overwrite: bool) -> Path:
    file = Path(output).expanduser()
    if file.suffix not in ENDINGS:
        raise SettingsError(f"output={str(output)!r} must end in {' or '.join(ENDINGS)}")
    if file.suffix == ".parquet":
        with explained(SettingsError, f"output={str(output)!r}", DataError):
            package("pyarrow")
    if file.exists() and not overwrite:
        raise SettingsError(f"{file} is there already: choose another name, or pass overwrite=True")
    return file


@dataclass(frozen=True)
class _Parts:
    """The parts of a file, in a folder beside it."""

    file: Path
    identity: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        return self.file.with_name(f"{self.file.name}.parts")

    def open(self, *, overwrite: bool) -> None:
        """Make the folder, or find that it is of the same call.

        :raises CheckpointError: when it is not.
        """
        if overwrite and self.folder.exists() and self._differs():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        note = self.folder / "teach.json"
        if not note.exists():
            write_sealed(note, self.identity)
        elif self._differs():
            raise CheckpointError(
                f"{self.folder} holds parts of another call, with another teacher or other settings: delete it, or "
                "pass overwrite=True"
            )

    def _differs(self) -> bool:
        note = self.folder / "teach.json"
        problem = f"{note} is damaged; delete {self.folder}"
        return not note.exists() or read_sealed(note, CheckpointError, problem) != dict(self.identity)

    def add(self, number: int, rows: Rows, columns: Callable[[], Mapping[str, list[Array]]]) -> None:
        """Write a part with the columns that are computed, unless it is there.

        :raises CheckpointError: when it is there, of other rows.
        """
        part, note = self._path(number), self._path(number).with_suffix(".json")
        digest = digest_of_data(rows, every=True)
        if note.exists() and part.exists():
            noted = read_sealed(note, CheckpointError, f"{note} is damaged; delete it")
            if noted["rows"] != digest:
                raise CheckpointError(f"{self.folder} holds parts of other rows: delete it, or pass overwrite=True")
            if noted["sha256"] == checksum(part):
                return
        computed = columns()
        with explained(DataError, "rows cannot be written", TypeError, ValueError, ArithmeticError):
            write(part, lambda path: write_part(path, rows, computed, self.file.suffix))
        write_sealed(note, {"rows": digest, "sha256": checksum(part)})

    def join(self, count: int) -> None:
        """Make one file of all parts, and remove them."""
        parts = [self._path(number) for number in range(1, count + 1)]
        write(self.file, lambda path: join_parts(path, parts, self.file.suffix))
        shutil.rmtree(self.folder)

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:07}{self.file.suffix}"

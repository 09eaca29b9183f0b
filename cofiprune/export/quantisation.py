"""int8 that keeps a model's score: what int8 costs is measured on the user's rows, and too much of it is refused.

Whole graphs in int8 are tried first. Where none holds the floor, the matrices whose products int8 changes most, each by
itself, are left in float: one, two, four, ..., then as few as will do. Files that hold the floor are timed in turn, and
the fastest is taken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch

from cofiprune.data.batches import Batch, Batches
from cofiprune.errors import ExportError, SettingsError, suggest
from cofiprune.export.integers import Effects, Feed, Matrix, Mode, effects, matrices, with_int8
from cofiprune.export.sessions import feed_of, onnx_answers
from cofiprune.measure.answers import Score, Scorer
from cofiprune.timing import in_turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODES: tuple[Mode, ...] = get_args(Mode)
CALIBRATION_ROWS = 64
_USUAL_DROP = 0.01
"""What decides between files where nothing is refused."""
_LARGEST_FLOAT_SHARE = 0.5
"""Of the parameters of products, and of those of tables and products; with more in float, the file is no int8 file."""


@dataclass(frozen=True)
class Attempt:
    """A file with int8 in it, and what it scored."""

    mode: str
    in_float: tuple[str, ...]
    """Names of the matrices that were left in float."""
    score: Score
    milliseconds: float | None = None
    """For a batch of the rows, on this machine; of those that were timed."""


@dataclass(frozen=True)
class Quantised:
    """How an int8 file was made, and what it and others scored."""

    mode: str
    matrices: int
    """Number of matrices and tables, those in float included."""
    in_float: tuple[str, ...] = ()
    tried: str = ""
    """What each form scored; empty where no rows were given."""

    @property
    def note(self) -> str:
        """All of it in words."""
        number = self.matrices - len(self.in_float)
        left = f"; in float: {', '.join(self.in_float)}" if self.in_float else ""
        tried = f"; tried: {self.tried}" if self.tried else ""
        return f"{self.mode}, {number} of {self.matrices} matrices in int8{left}{tried}"


def figures(scorer: Scorer, attempts: Sequence[Attempt]) -> str:
    """Say what each attempt scored."""
    before, metric, found = scorer.reference.value, scorer.metric, []
    for attempt in attempts:
        left = f" with {len(attempt.in_float)} matrices in float" if attempt.in_float else ""
        value = attempt.score.value
        text = f"{attempt.mode}{left}: {metric} {value:.4f}, float {before:.4f}, drop {before - value:.4f}"
        if metric != "agreement":
            text += f", agreement {attempt.score.agreement:.4f}"
        found.append(text if attempt.milliseconds is None else f"{text}, {attempt.milliseconds:.2f} ms a batch")
    return "; ".join(found)


def refused(scorer: Scorer, attempts: Sequence[Attempt], max_drop: float, possible: str = "") -> ExportError:
    """Return the error that says what int8 would have cost."""
    asked = f"int8 costs more than max_drop={max_drop:g} on these rows, so nothing was written"
    return ExportError(f"{asked}: {figures(scorer, attempts)}.{possible}")


def check_int8(int8: bool | str, dataset: Any, max_drop: float | None) -> None:
    """Refuse arguments that say nothing, before anything is written.

    :raises SettingsError: naming what is possible.
    """
    if isinstance(int8, str) and int8 not in MODES:
        raise SettingsError(f"int8 is True or one of {', '.join(MODES)}, not {int8!r}.{suggest(int8, MODES)}")
    if int8 == "static" and dataset is None:
        raise SettingsError("int8='static' reads ranges off rows: give dataset=rows, or int8='dynamic'")
    if max_drop is None:
        return
    if not int8:
        raise SettingsError("max_drop says what int8 may cost: give int8=True with it")
    if dataset is None:
        raise SettingsError("max_drop is measured on rows: give dataset=rows with it")
    if isinstance(max_drop, bool) or not isinstance(max_drop, int | float) or not 0 <= max_drop < 1:
        raise SettingsError(f"max_drop is a fraction, 0.01 for one point in a hundred, and below 1; not {max_drop!r}")


def quantise_onnx(
    source: Path,
    target: Path,
    model: PreTrainedModel,
    *,
    int8: bool | str = True,
    scorer: Scorer | None = None,
    max_drop: float | None = None,
) -> Quantised:
    """Write an int8 form of a float32 ONNX file.

    :param model: what the file was exported from; it says how matrices are called.
    :param int8: True for the fastest form that holds the floor, or one of `MODES`.
    :param scorer: of the rows to calibrate and to score on; without, nothing is scored.
    :param max_drop: what the score may lose, as a fraction; None refuses nothing.
    :raises ExportError: when no int8 form holds the floor. The file is not there then.
    """
    graph = import_module("onnx").load(str(source))
    found = matrices(graph)
    if not found:
        raise ExportError(f"this {type(model).__name__} has no matrices that could be int8")
    if scorer is None:
        mode: Mode = "dynamic" if int8 is True else int8  # type: ignore[assignment]
        _save(with_int8(graph, found, mode, {}), target)
        return Quantised(mode, len(found))
    rows = list(calibration(scorer.batches, {entry.name for entry in graph.graph.input}))
    search = _Search(graph, _named(found, model), effects(source, found, rows), scorer, target)
    try:
        chosen = search.best([int8] if isinstance(int8, str) else list(MODES), max_drop)  # type: ignore[list-item]
    except ExportError:
        target.unlink()
        raise
    return Quantised(chosen.mode, len(found), chosen.in_float, figures(scorer, search.attempts))


class _Search:
    """Tries files, and keeps what each scored."""

    def __init__(
        self, graph: Any, named: Sequence[tuple[str, Matrix]], measured: Effects, scorer: Scorer, file: Path
    ) -> None:
        self._graph, self._named, self._measured, self._scorer, self._file = graph, named, measured, scorer, file
        self.attempts: list[Attempt] = []

    def best(self, modes: Sequence[Mode], max_drop: float | None) -> Attempt:
        """Write the fastest file that holds the floor.

        :raises ExportError: when none does.
        """
        before = self._scorer.reference.value
        floor = before - (_USUAL_DROP if max_drop is None else max_drop) - 1e-9
        whole = [self._tried(mode, 0) for mode in modes]
        fit = [attempt for attempt in whole if attempt.score.value >= floor]
        integer = [attempt for attempt in whole if attempt.mode != "weights"] or whole
        if not any(attempt in fit for attempt in integer):
            most = max(integer, key=lambda attempt: attempt.score.value)
            fit += self._fewest_in_float(most.mode, floor)  # type: ignore[arg-type]
        if not fit and max_drop is not None:
            other = "" if "weights" in modes else " int8='weights' computes in float what it reads as int8."
            raise refused(self._scorer, self.attempts, max_drop, other)
        chosen = self._fastest(fit) if fit else max(self.attempts, key=lambda attempt: attempt.score.value)
        self._write(chosen.mode, len(chosen.in_float))  # type: ignore[arg-type]
        return chosen

    def _ordered(self, mode: Mode) -> list[tuple[str, Matrix]]:
        errors = self._measured.errors[mode]
        return sorted(self._named, key=lambda each: -errors[each[1].output])

    def _write(self, mode: Mode, in_float: int) -> None:
        chosen = [matrix for _, matrix in self._ordered(mode)[in_float:]]
        _save(with_int8(self._graph, chosen, mode, self._measured.ranges), self._file)

    def _tried(self, mode: Mode, in_float: int) -> Attempt:
        self._write(mode, in_float)
        names = tuple(name for name, _ in self._ordered(mode)[:in_float])
        self.attempts.append(Attempt(mode, names, self._scorer.score(onnx_answers(self._file))))
        return self.attempts[-1]

    def _fewest_in_float(self, mode: Mode, floor: float) -> list[Attempt]:
        """Leave the worst matrices in float, as few as hold the floor; none where too many would have to be."""
        pairs = [(0 if m.table else m.values.size, m.values.size) for _, m in self._ordered(mode)]
        sizes = np.cumsum(pairs, axis=0)  # of products, and of tables too
        most = int((sizes <= _LARGEST_FLOAT_SHARE * sizes[-1]).all(axis=1).sum())
        low, high, found = 0, 1, None
        while low < most:
            attempt = self._tried(mode, high := min(high, most))
            if attempt.score.value >= floor:
                found = attempt
                break
            low, high = high, 2 * high
        while found is not None and high - low > 1:
            attempt = self._tried(mode, middle := (low + high) // 2)
            if attempt.score.value >= floor:
                found, high = attempt, middle
            else:
                low = middle
        return [] if found is None else [found]

    def _fastest(self, fit: Sequence[Attempt]) -> Attempt:
        """Time files on a batch of the rows, in turn."""
        if len(fit) == 1:
            return fit[0]
        batch = next(islice(self._scorer.batches, len(self._scorer.batches) // 2, None))
        passes = []
        for attempt in fit:
            self._write(attempt.mode, len(attempt.in_float))  # type: ignore[arg-type]
            passes.append(partial(onnx_answers(self._file), batch))
        times = in_turn(passes, torch.device("cpu"), seconds=2.0)
        timed = [replace(a, milliseconds=1e3 * float(np.median(t))) for a, t in zip(fit, times, strict=True)]
        kept = dict(zip(map(id, fit), timed, strict=True))
        self.attempts = [kept.get(id(attempt), attempt) for attempt in self.attempts]
        return min(timed, key=lambda attempt: attempt.milliseconds or 0.0)


def calibration(batches: Batches, given: set[str]) -> Iterator[Feed]:
    """Give inputs of rows one by one, without their padding, a few of each batch: batches go by length.

    :param given: names of the inputs that the file reads.
    """
    per_batch = -(-CALIBRATION_ROWS // len(batches))
    rows = (row for batch in batches for row in islice(_rows(batch), per_batch))
    for row in islice(rows, CALIBRATION_ROWS):
        yield feed_of(row, given)


def _rows(batch: Batch) -> Iterator[Batch]:
    mask = batch.get("attention_mask")
    for index in range(len(next(iter(batch.values())))):
        row = {name: value[index : index + 1] for name, value in batch.items()}
        if mask is not None and mask.dim() == 2:
            read = mask[index].bool()
            row = {name: v[:, read] if v.shape[1:2] == mask.shape[1:] else v for name, v in row.items()}
        yield row


def _named(found: Sequence[Matrix], model: PreTrainedModel) -> list[tuple[str, Matrix]]:
    """Call matrices as the model does whose parameters they are; others keep the names of the file."""
    wanted = {_digest(matrix.values) for matrix in found}
    names: dict[str, str] = {}
    for name, value in model.named_parameters():
        if value.dim() == 2:
            array = value.detach().float().cpu().numpy()
            for digest in {_digest(array), _digest(array.T)} & wanted:
                names.setdefault(digest, name)
    return [(names.get(_digest(matrix.values), matrix.weight), matrix) for matrix in found]


def _digest(values: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def _save(graph: Any, file: Path) -> None:
    import_module("onnx").save(graph, str(file))

"""What a teacher has put out for each row, in columns of the rows, so that the teacher itself need not be there.

| column | of a row |
|---|---|
| `teacher_logits` | [C]; [t, C] for labels of tokens; [t, 2], start and end, for spans; [choices] |
| `teacher_embedding` | [H], the vector of a text, for an encoder without a head |
| `teacher_hidden` | [t, H], the states of the last layer, or [S, t, H] those of several |

Shapes: t tokens of the row, C classes, H the teacher's width, S layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from numpy.typing import NDArray

from cofiprune.data.tasks import Task

LOGITS, EMBEDDING, HIDDEN = "teacher_logits", "teacher_embedding", "teacher_hidden"
CACHED = (LOGITS, EMBEDDING, HIDDEN)


def with_cached(row: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of tokens with what a teacher has put out for the row that it was made of."""
    return {**row, **{name: raw[name] for name in CACHED if name in raw}}


def cached_problems(
    row: Mapping[str, NDArray[Any]], first: Mapping[str, NDArray[Any]], task: Task, outputs: int, model: str
) -> Iterator[str]:
    """Say what is wrong with a teacher's outputs in a row.

    :param outputs: of the head, classes or numbers.
    :param model: the name of its class, for messages.
    """
    if LOGITS in row:
        yield from _logit_problems(row, first, task, outputs, model)
    if EMBEDDING in row:
        if task != "embedding":
            yield f"{EMBEDDING!r} teaches an encoder without a head; a {model} learns from {LOGITS!r}"
        yield from _unlike(EMBEDDING, row[EMBEDDING], first[EMBEDDING].shape, "row 0 has", dimensions=(1,))
    if HIDDEN in row:
        states, tokens = row[HIDDEN], row["input_ids"].shape[-1] if "input_ids" in row else None
        if states.ndim in (2, 3) and tokens is not None and states.shape[-2] != tokens:
            yield (
                f"{HIDDEN!r} has states of {states.shape[-2]} tokens and 'input_ids' {tokens}; they must come from the "
                "same tokenizer and max_length"
            )
        alike = (*first[HIDDEN].shape[:-2], states.shape[-2] if states.ndim > 1 else 0, first[HIDDEN].shape[-1])
        yield from _unlike(HIDDEN, states, alike, "row 0's would be", dimensions=(2, 3))


def _logit_problems(
    row: Mapping[str, NDArray[Any]], first: Mapping[str, NDArray[Any]], task: Task, outputs: int, model: str
) -> Iterator[str]:
    logits = row[LOGITS]
    if task == "embedding":
        yield f"{LOGITS!r} teaches a head, which a {model} does not have: pass {EMBEDDING!r}"
        return
    tokens = row["input_ids"].shape[-1] if "input_ids" in row else logits.shape[0] if logits.ndim else 0
    wanted: Mapping[str, tuple[int, ...]] = {
        "token-classification": (tokens, outputs),
        "question-answering": (tokens, 2),
        "masked-lm": (tokens, first[LOGITS].shape[-1] if first[LOGITS].ndim else 0),
        "multiple-choice": (len(row["input_ids"]) if "input_ids" in row else outputs,),
        "other": first[LOGITS].shape,
    }
    if task == "regression" and outputs == 1 and logits.size == 1:
        return
    yield from _unlike(LOGITS, logits, wanted.get(task, (outputs,)), f"those of this {model} are")


def _unlike(
    name: str, cell: NDArray[Any], wanted: tuple[int, ...], who: str, *, dimensions: tuple[int, ...] = ()
) -> Iterator[str]:
    if dimensions and cell.ndim not in dimensions:
        yield f"{name!r} has {cell.ndim} dimensions, shape {cell.shape}; it takes {' or '.join(map(str, dimensions))}"
    elif cell.shape != wanted:
        yield f"{name!r} has shape {cell.shape}, {who} {wanted}"

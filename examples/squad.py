"""Question answering on passages, as SQuAD asks it: windows of tokens, answers from logits, exact match and F1.

A passage that is longer than the model reads is cut into windows that overlap. Each window is one row for the
model; the answer to a question is the best span over all of its windows.
"""

import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cofiprune.errors import DataError

LONGEST_QUESTION = 64
"""Tokens after which a question is cut; a few questions of SQuAD are longer."""
AT_ONCE = 1000
"""Questions that are tokenised in one go, which bounds the memory that it takes."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Question:
    """A question on a passage, with the answers that count as right."""

    id: str
    context: str
    question: str
    answers: tuple[str, ...]
    """As they stand in the context; none for a question that the passage does not answer."""
    starts: tuple[int, ...]
    """Where each answer begins, in characters of the context."""


@dataclass(frozen=True)
class Window:
    """One row of tokens, and where they come from."""

    question: int
    """Index of its question."""
    offsets: NDArray[np.int32]
    """[tokens, 2]: first character in the context and one past the last; -1 for a token that is not of the context."""


@dataclass(frozen=True)
class Answer:
    """A span of the context, and how much the model is for it."""

    text: str
    """Empty for "there is no answer"."""
    score: float
    """Sum of the logits of its first and its last token."""


@dataclass(frozen=True)
class SpanSettings:
    """How spans are chosen."""

    n_best: int = 20
    """First tokens, last tokens and answers that are considered."""
    max_answer_length: int = 30
    """In tokens."""
    version_2: bool = False
    """Whether "there is no answer" is an answer, as in SQuAD 2.0."""
    null_threshold: float = 0.0
    """It is given when the score of no answer exceeds the best span's by more than this."""


def encode(
    questions: Sequence[Question], tokenizer: Any, *, max_length: int = 384, stride: int = 128
) -> tuple[Rows, list[Window]]:
    """Cut questions with their passages into windows of tokens.

    A row has what the tokenizer gives, and `start_positions` and `end_positions`: the first and the last token of the
    question's first answer, or 0 (the first special token) where the window does not hold all of that answer.

    :param max_length: most tokens of a window, question and special tokens included.
    :param stride: tokens of the passage that two neighbouring windows share.
    :raises DataError: when the tokenizer gives no offsets, or windows are too short for the stride.
    """
    if not tokenizer.is_fast:
        raise DataError("answers are spans of text: this needs a fast tokenizer (tokenizer.json), the model has none")
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True) - stride
    if room < 2:
        raise DataError(
            f"--doc-stride {stride} leaves no room for question and passage in windows of --max-length {max_length} "
            f"tokens; it can be {max(0, stride + room - 2)} at most"
        )
    rows: Rows = []
    windows: list[Window] = []
    for begin in range(0, len(questions), AT_ONCE):
        part = questions[begin : begin + AT_ONCE]
        encoded = tokenizer(
            _cut([question.question.strip() for question in part], tokenizer, min(LONGEST_QUESTION, room // 2)),
            [question.context for question in part],
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        columns = {name: encoded[name] for name in tokenizer.model_input_names if name in encoded}
        for index, source in enumerate(encoded["overflow_to_sample_mapping"]):
            offsets = np.array(encoded["offset_mapping"][index], np.int32)
            offsets[[origin != 1 for origin in encoded.sequence_ids(index)]] = -1
            first, last = span_of(part[source], offsets)
            row = {name: np.array(cells[index], np.int32) for name, cells in columns.items()}
            rows.append({**row, "start_positions": first, "end_positions": last})
            windows.append(Window(begin + source, offsets))
    return rows, windows


def _cut(texts: list[str], tokenizer: Any, longest: int) -> list[str]:
    """Texts of no more than `longest` tokens."""
    encoded = tokenizer(
        texts, add_special_tokens=False, truncation=True, max_length=longest, return_offsets_mapping=True
    )
    # The last token of a text that is short enough may end before the text does; what follows has no tokens.
    return [
        text[: offsets[-1][1]] if offsets else ""
        for text, offsets in zip(texts, encoded["offset_mapping"], strict=True)
    ]


def span_of(question: Question, offsets: NDArray[np.int32]) -> tuple[int, int]:
    """First and last token of the first answer; (0, 0) where a window does not hold all of it.

    :param offsets: [tokens, 2], as in `Window`.
    """
    if not question.answers or not question.answers[0].strip():
        return 0, 0
    text = question.answers[0]
    begin = question.starts[0] + len(text) - len(text.lstrip())
    end = begin + len(text.strip())
    covered = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > begin) & (offsets[:, 0] >= 0))
    if not covered.size or offsets[covered[0], 0] > begin or offsets[covered[-1], 1] < end:
        return 0, 0
    return int(covered[0]), int(covered[-1])


def find_answers(
    questions: Sequence[Question],
    windows: Sequence[Window],
    starts: NDArray[np.floating[Any]],
    ends: NDArray[np.floating[Any]],
    settings: SpanSettings = SpanSettings(),
) -> list[list[Answer]]:
    """The best answers to each question, the best one first: never none, at most `n_best`.

    :param windows: all windows of a question one after the other, as `encode` gives them.
    :param starts: [windows, tokens], how much each token is for being the first of the answer; what stands after the
        last token of a window is not read.
    :param ends: likewise for the last token.
    """
    found: list[list[Answer]] = [[Answer("", -np.inf)] for _ in questions]
    numbered = enumerate(windows)
    for source, group in groupby(numbered, key=lambda pair: pair[1].question):
        spans: list[Answer] = []
        nulls: list[float] = []
        for index, window in group:
            spans += _spans(questions[source].context, window, starts[index], ends[index], settings)
            nulls.append(float(starts[index, 0] + ends[index, 0]))
        best = sorted(spans, key=lambda answer: -answer.score)
        if settings.version_2:
            null = Answer("", min(nulls))  # an answer in any window speaks against none
            wins = not best or null.score - best[0].score > settings.null_threshold
            best.insert(0 if wins else 1, null)
        if best:
            found[source] = best[: settings.n_best]
    return found


def _spans(
    context: str,
    window: Window,
    starts: NDArray[np.floating[Any]],
    ends: NDArray[np.floating[Any]],
    settings: SpanSettings,
) -> Iterator[Answer]:
    """The best spans of one window."""
    inside = np.flatnonzero(window.offsets[:, 0] >= 0)
    firsts = inside[np.argsort(-starts[inside], kind="stable")[: settings.n_best]]
    lasts = inside[np.argsort(-ends[inside], kind="stable")[: settings.n_best]]
    lengths = lasts[None, :] - firsts[:, None] + 1
    scores = np.where(
        (lengths > 0) & (lengths <= settings.max_answer_length), starts[firsts][:, None] + ends[lasts], -np.inf
    )
    for place in np.argsort(-scores, axis=None, kind="stable")[: settings.n_best]:
        row, column = np.unravel_index(place, scores.shape)
        if scores[row, column] == -np.inf:
            return
        begin, end = window.offsets[firsts[row], 0], window.offsets[lasts[column], 1]
        yield Answer(context[begin:end], float(scores[row, column]))


def squad_metrics(questions: Sequence[Question], predictions: Sequence[str], *, version_2: bool) -> dict[str, float]:
    """Exact match and F1 by SQuAD's rules, as fractions.

    For SQuAD 2.0 also those of the questions that have an answer, and of those that have none.

    :param predictions: one text per question; empty for "there is no answer".
    """
    scores = np.array(
        [_score(text, item.answers, version_2) for item, text in zip(questions, predictions, strict=True)]
    )
    parts = {"": np.full(len(questions), True)}
    if version_2:
        answered = np.array([bool(item.answers) for item in questions])
        parts |= {"has_answer_": answered, "no_answer_": ~answered}
    return {
        f"{part}{name}": float(scores[chosen, column].mean())
        for part, chosen in parts.items()
        if chosen.any()
        for column, name in enumerate(("exact_match", "f1"))
    }


def _score(prediction: str, answers: Sequence[str], version_2: bool) -> tuple[float, float]:
    """Exact match and F1 of one question: the best over its answers."""
    if version_2:
        answers = [answer for answer in answers if normalised(answer)]
        if not answers:
            right = float(not normalised(prediction))
            return right, right
    return max(exact_match(prediction, answer) for answer in answers), max(f1(prediction, answer) for answer in answers)


def normalised(text: str) -> str:
    """A text without case, punctuation, articles and extra white space.

    >>> normalised("The  Cat's  hat, a hat.")
    'cats hat hat'
    """
    letters = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", letters).split())


def exact_match(prediction: str, answer: str) -> float:
    """1 where two texts are equal but for case, punctuation, articles and white space, else 0."""
    return float(normalised(prediction) == normalised(answer))


def f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the words that two texts have in common, in [0, 1]."""
    words, expected = normalised(prediction).split(), normalised(answer).split()
    common = sum((Counter(words) & Counter(expected)).values())
    return 2 * common / (len(words) + len(expected)) if common else 0.0

"""Rows of text to rows of tokens: which column is what, and the tokens of each task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cofiprune.data.cached import with_cached
from cofiprune.data.tasks import IGNORED, LABEL_COLUMNS, Labels, Task, task_of
from cofiprune.errors import DataError, explained, located, suggest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RawRow = Mapping[str, Any]
# What the files of GLUE, SQuAD and CoNLL call them, in the order in which they are looked for.
_TEXTS: tuple[tuple[str, ...], ...] = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question", "context"),
    ("text_a", "text_b"),
    ("#1 String", "#2 String"),
    ("sentence",),
    ("text",),
)
_WORDS = (("tokens",), ("words",))
_LABELS: Mapping[Task, tuple[str, ...]] = {
    "token-classification": ("ner_tags", "pos_tags", "tags", *LABEL_COLUMNS),
    "question-answering": ("answers",),
    "masked-lm": (),
}
_INPUTS = ("input_ids", "pixel_values", "input_values", "input_features", "inputs_embeds")
_CLASSIFIERS = ("classification", "regression", "multi-label")
_LENGTHS: Mapping[Task, int] = {"question-answering": 384}  # as the published SQuAD models were trained
_LENGTH = 128
_LONGEST_QUESTION = 64
"""Tokens after which a question is cut; a few questions of SQuAD are longer."""
_AT_ONCE = 1000
"""Questions that are tokenised in one go, which bounds the memory that it takes."""


@dataclass(frozen=True)
class TextColumns:
    """Names of the columns that are read."""

    text: str | None
    """None for rows that are a model's inputs already."""
    pair: str | None = None
    label: str | None = None


def find_text_columns(
    row: RawRow,
    task: Task,
    *,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    where: str = "the data",
) -> TextColumns:
    """Choose the columns to read: those that are named, else those of a known name.

    :param row: the first one.
    :param where: what messages call the data.
    :raises DataError: when a column that is named is not there, or no text is recognised.
    """
    for name in (text_column, text_pair_column, label_column):
        if name is not None and name not in row:
            raise DataError(f"{where} has no column {name!r}.{suggest(name, row)} Its columns: {', '.join(row)}")
    label = label_column or next((name for name in _LABELS.get(task, LABEL_COLUMNS) if name in row), None)
    if text_column is not None:
        return TextColumns(text_column, text_pair_column, label)
    if any(not isinstance(row.get(name), str | None) for name in _INPUTS):
        return TextColumns(None, None, label)
    known = _WORDS if task == "token-classification" else _TEXTS
    found = next((names for names in known if all(name in row for name in names)), None)
    if found is None:
        raise DataError(
            f"{where} has no text column of a known name ({', '.join(map('+'.join, known))}); its columns are "
            f"{', '.join(row)}; name them by text_column and label_column"
        )
    return TextColumns(found[0], text_pair_column or next(iter(found[1:]), None), label)


def tokenise(
    rows: Sequence[RawRow],
    tokenizer: Any,
    model: PreTrainedModel,
    *,
    columns: TextColumns | None = None,
    max_length: int | None = None,
    stride: int | None = None,
    where: str = "the data",
) -> list[dict[str, Any]]:
    """Turn rows of text into the rows of tokens that a model reads, with labels where there are any.

    Labels may be names of the model's classes. Words with a label each (`tokens`, `ner_tags`) give the label to the
    first token of the word, and a column `words` has the number of the word that begins at a token, else -1. Answers
    to questions on a passage become `start_positions` and `end_positions`; no answer is a span at the first token.

    :param columns: by default those of a known name.
    :param max_length: tokens after which a text is cut; 128 by default, 384 with passages, as far as the model reads.
    :param stride: cut a long passage into several rows that share this many tokens, instead of dropping its end. A row
        then says which question it is of, `example`, and has `offsets`, [tokens, 2]: where a token stands in the
        passage, -1 for one that does not. An answer that is not whole in a row counts as none there.
    :param where: what messages call the data.
    :raises DataError: when a row has no text, or a label that is none of the model's.
    """
    columns = columns or find_text_columns(rows[0], task_of(model), where=where)
    with located(f"{where}: "):
        found = _tokenised(rows, tokenizer, model, columns, max_length, stride)
        # What a teacher put out for a passage is of no use for its parts.
        return found if stride is not None else [with_cached(*pair) for pair in zip(found, rows, strict=True)]


def _tokenised(
    rows: Sequence[RawRow],
    tokenizer: Any,
    model: PreTrainedModel,
    columns: TextColumns,
    max_length: int | None,
    stride: int | None,
) -> list[dict[str, Any]]:
    """Tokenise what the columns name, by the task of the model."""
    task = task_of(model)
    length = _length(max_length, task, model)
    if columns.text is None:
        found = [{name: value for name, value in row.items() if name != columns.label} for row in rows]
    elif tokenizer is None:
        raise DataError("text needs a tokenizer")
    elif task == "token-classification":
        return _words(rows, columns, tokenizer, length, Labels.of_model(model.config))
    elif task == "question-answering":
        parts = range(0, len(rows), _AT_ONCE)
        return [row for start in parts for row in _questions(rows, start, columns, tokenizer, length, stride)]
    else:
        texts = _cells(rows, columns.text, str)
        pairs = None if columns.pair is None else _cells(rows, columns.pair, str)
        found = _rows(tokenizer(texts, pairs, truncation=True, max_length=length))
    if columns.label is None:
        return found
    labels = [row.get(columns.label) for row in rows]
    if task in _CLASSIFIERS:
        labels = Labels.of_model(model.config).encode(labels)
    return [{**row, "labels": label} for row, label in zip(found, labels, strict=True)]


def collator_for(model: PreTrainedModel, tokenizer: Any) -> Any:
    """Return what makes batches of tokenised texts, where that is more than padding them: None where it is not."""
    if task_of(model) != "masked-lm":
        return None
    from transformers import DataCollatorForLanguageModeling

    return DataCollatorForLanguageModeling(tokenizer)


def _words(
    rows: Sequence[RawRow], columns: TextColumns, tokenizer: Any, length: int, labels: Labels
) -> list[dict[str, Any]]:
    """Tokenise words; of a word of several tokens the first one has its label."""
    _check_fast(tokenizer, "labels of words")
    words = _cells(rows, str(columns.text), list)
    for number, row in enumerate(words):
        if not all(isinstance(word, str) for word in row):
            raise DataError(f"row {number} (from 0) has no list of words in {columns.text!r}, but {row!r}")
    encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=length)
    found = _rows(encoded)
    for number, row in enumerate(found):
        origins = encoded.word_ids(number)
        pairs = zip([None, *origins], origins, strict=False)
        row["words"] = [-1 if word is None or word == before else word for before, word in pairs]
    if columns.label is not None:
        for number, tags in enumerate(_cells(rows, columns.label, list)):
            if len(tags) != len(words[number]):
                raise DataError(f"row {number} (from 0) has {len(words[number])} words and {len(tags)} labels")
            with located(f"row {number} (from 0), "):
                ids = [*labels.encode(tags, "word"), IGNORED]
            found[number]["labels"] = [ids[word] for word in found[number]["words"]]
    return found


def _questions(
    rows: Sequence[RawRow], start: int, columns: TextColumns, tokenizer: Any, length: int, stride: int | None
) -> Iterator[dict[str, Any]]:
    """Tokenise questions with their passages, from row `start` on."""
    if columns.pair is None:
        raise DataError(f"there is no passage for {columns.text!r}; name its column by text_pair_column")
    _check_fast(tokenizer, "spans of answers")
    rows = rows[start : start + _AT_ONCE]
    questions, passages = (_cells(rows, name, str, start) for name in (str(columns.text), columns.pair))
    room = length - tokenizer.num_special_tokens_to_add(pair=True) - (stride or 0)
    if room < 2:
        raise DataError(
            f"stride={stride} leaves no room for question and passage in {length} tokens; it can be "
            f"{max(0, room + (stride or 0) - 2)} at most"
        )
    encoded = tokenizer(
        [_cut(question.strip(), tokenizer, min(_LONGEST_QUESTION, room // 2)) for question in questions],
        passages,
        truncation="only_second",
        max_length=length,
        return_offsets_mapping=True,
        **({} if stride is None else {"stride": stride, "return_overflowing_tokens": True}),
    )
    offsets = encoded.pop("offset_mapping")
    sources = encoded.pop("overflow_to_sample_mapping", range(len(rows)))
    answers = None if columns.label is None else _cells(rows, columns.label, dict, start)
    for index, (row, source) in enumerate(zip(_rows(encoded), sources, strict=True)):
        inside = np.array(encoded.sequence_ids(index), dtype=object) == 1
        places = np.where(inside[:, None], offsets[index], -1).astype(np.int32)
        if answers is not None:
            with located(f"row {start + source} (from 0): "):
                begin, end = _characters(answers[source], passages[source])
            # One past the last token is a span that no loss counts.
            missed = (0, 0) if stride is not None else (len(places), len(places))
            row["start_positions"], row["end_positions"] = (0, 0) if begin == end else _span(places, begin, end, missed)
        yield row if stride is None else {**row, "example": start + source, "offsets": places}


def _characters(answer: Mapping[str, Any], passage: str) -> tuple[int, int]:
    """Return where the first answer stands in its passage; (0, 0) for none."""
    texts, starts = answer.get("text"), answer.get("answer_start")
    problem = f"an answer is {{'text': [...], 'answer_start': [...]}}, not {dict(answer)!r}"
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise DataError(problem)
    if not texts:
        return 0, 0
    with explained(DataError, problem, TypeError, ValueError, OverflowError):
        text, begin = texts[0], int(starts[0])
    if not isinstance(text, str):
        raise DataError(problem)
    there = passage[begin : begin + len(text)] if begin >= 0 else ""
    if not text or text != there:
        raise DataError(f"the answer {text!r} does not stand at character {begin}, but {there!r}")
    return begin + len(text) - len(text.lstrip()), begin + len(text.rstrip())


def _span(places: Any, begin: int, end: int, missed: tuple[int, int]) -> tuple[int, int]:
    """Return the first and the last token of an answer; `missed` where it is not whole.

    :param places: [tokens, 2], characters of each token.
    """
    covered = np.flatnonzero((places[:, 0] < end) & (places[:, 1] > begin) & (places[:, 0] >= 0))
    if not covered.size or places[covered[0], 0] > begin or places[covered[-1], 1] < end:
        return missed
    return int(covered[0]), int(covered[-1])


def _cut(text: str, tokenizer: Any, longest: int) -> str:
    """Return a text of no more than `longest` tokens."""
    if len(text) <= longest:
        return text
    options = {"add_special_tokens": False, "return_offsets_mapping": True}
    offsets = tokenizer(text, truncation=True, max_length=longest, **options)["offset_mapping"]
    return text[: offsets[-1][1]] if offsets else ""


def _length(asked: int | None, task: Task, model: PreTrainedModel) -> int:
    from cofiprune.data.checks import longest_sequence  # torch need not be there to know the columns

    limit = longest_sequence(model)
    if asked is not None and limit is not None and asked > limit:
        raise DataError(f"max_length is {asked}; {type(model).__name__} reads at most {limit} tokens")
    length = asked or _LENGTHS.get(task, _LENGTH)
    return length if limit is None else min(length, limit)


def _check_fast(tokenizer: Any, noun: str) -> None:
    if not tokenizer.is_fast:
        raise DataError(f"{noun} need a fast tokenizer (tokenizer.json), which this model does not have")


def _cells(rows: Sequence[RawRow], name: str, kind: type, start: int = 0) -> list[Any]:
    """Return the values of a column that must all be of one type; rows count from `start`."""
    nouns: Mapping[type, str] = {str: "text", list: "list of words", dict: "answer"}
    for number, row in enumerate(rows, start):
        if not isinstance(row.get(name), kind):
            raise DataError(f"row {number} (from 0) has no {nouns[kind]} in {name!r}, but {row.get(name)!r}")
    return [row[name] for row in rows]


def _rows(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]

"""From rows of a data file to the rows of tokens that a model reads, by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cofiprune.cli.columns import Columns, column
from cofiprune.cli.files import Row
from cofiprune.cli.labels import Head
from cofiprune.data.tasks import IGNORED
from cofiprune.errors import DataError

CLASSIFIERS = ("sequence-classification", "image-classification", "audio-classification")


def tokenised(
    rows: Sequence[Row], columns: Columns, task: str, tokenizer: Any, *, max_length: int, head: Head, where: str
) -> list[dict[str, Any]]:
    """Tokenise rows and add their labels, where they have any.

    :param head: of the model, whose classes the labels are.
    :param where: the file, for messages.
    :raises DataError: when a row has no text, or a label that is none of the model's.
    """
    if columns.text is None:
        found: list[dict[str, Any]] = [dict(row) for row in rows]
    elif task == "token-classification":
        return _tagged(rows, columns, tokenizer, max_length, head, where)
    elif task == "question-answering":
        return _answered(rows, columns, tokenizer, max_length, where)
    else:
        texts = column(rows, columns.text, str, where)
        pairs = None if columns.pair is None else column(rows, columns.pair, str, where)
        found = _rows(tokenizer(texts, pairs, truncation=True, max_length=max_length))
    if columns.label is not None:
        labels = [row.pop(columns.label) for row in found] if columns.text is None else _cells(rows, columns.label)
        labels = head.encode(labels, where) if task in CLASSIFIERS else labels
        found = [{**row, "labels": label} for row, label in zip(found, labels, strict=True)]
    return found


def _tagged(
    rows: Sequence[Row], columns: Columns, tokenizer: Any, max_length: int, head: Head, where: str
) -> list[dict[str, Any]]:
    """Words with a label each; of a word of several tokens the first one has it."""
    if not tokenizer.is_fast:
        raise DataError("labels of words need a fast tokenizer (tokenizer.json), which this model does not have")
    assert columns.text is not None
    words = column(rows, columns.text, list, where)
    encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
    found = _rows(encoded)
    if columns.label is None:
        return found
    for number, tags in enumerate(column(rows, columns.label, list, where)):
        place = f"{where}, row {number} (from 0)"
        if len(tags) != len(words[number]):
            raise DataError(f"{place} has {len(words[number])} words and {len(tags)} labels")
        ids = head.encode(tags, place)
        origins = encoded.word_ids(number)
        firsts = [word is not None and word != before for before, word in zip([None, *origins], origins, strict=False)]
        found[number]["labels"] = [ids[word] if first else IGNORED for first, word in zip(firsts, origins, strict=True)]
    return found


def _answered(
    rows: Sequence[Row], columns: Columns, tokenizer: Any, max_length: int, where: str
) -> list[dict[str, Any]]:
    """Questions on passages with the span of the answer; no answer is a span at the first token."""
    if columns.pair is None:
        raise DataError(f"{where} has no passage beside {columns.text!r}; name its column by --text-pair-column")
    if not tokenizer.is_fast:
        raise DataError("spans of answers need a fast tokenizer (tokenizer.json), which this model does not have")
    assert columns.text is not None
    questions, passages = (column(rows, name, str, where) for name in (columns.text, columns.pair))
    encoded = tokenizer(
        questions, passages, truncation="only_second", max_length=max_length, return_offsets_mapping=True
    )
    offsets = encoded.pop("offset_mapping")
    found = _rows(encoded)
    if columns.label is None:
        return found
    for number, answer in enumerate(column(rows, columns.label, dict, where)):
        begin, end = _characters(answer, f"{where}, row {number} (from 0)")
        inside = [origin == 1 for origin in encoded.sequence_ids(number)]
        start, stop = _span(offsets[number], inside, begin, end)
        found[number].update(start_positions=start, end_positions=stop)
    return found


def _characters(answer: Mapping[str, Any], where: str) -> tuple[int, int]:
    """Where the first answer stands in its passage; (0, 0) for none."""
    texts, starts = answer.get("text"), answer.get("answer_start")
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise DataError(f"{where}: an answer is {{'text': [...], 'answer_start': [...]}}, not {dict(answer)!r}")
    return (int(starts[0]), int(starts[0]) + len(texts[0])) if texts else (0, 0)


def _span(offsets: Sequence[tuple[int, int]], inside: Sequence[bool], begin: int, end: int) -> tuple[int, int]:
    """First and last token of an answer; one past the last token, which no loss counts, where it was cut off."""
    if begin == end:
        return 0, 0
    covered = [
        index
        for index, ((first, last), passage) in enumerate(zip(offsets, inside, strict=True))
        if passage and first < end and last > begin
    ]
    cut = not covered or offsets[covered[-1]][1] < end
    return (len(offsets), len(offsets)) if cut else (covered[0], covered[-1])


def _cells(rows: Sequence[Row], name: str) -> list[Any]:
    return [row.get(name) for row in rows]


def _rows(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]

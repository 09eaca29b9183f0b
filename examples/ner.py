"""Named entities: tagged words from files, from the hub or made up, their tokens, and scores per entity.

Tags follow the IOB scheme: B-person begins an entity of the kind person, I-person goes on with it, O is outside.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from splits import Row, hub_splits, need_columns, numbered, read_split

from cofiprune.data.tasks import IGNORED
from cofiprune.errors import DataError, suggest

LABEL_NAMES = {
    "wnut17": (
        "O", "B-corporation", "I-corporation", "B-creative-work", "I-creative-work", "B-group", "I-group",
        "B-location", "I-location", "B-person", "I-person", "B-product", "I-product",
    ),
    "ncbi_disease": ("O", "B-Disease", "I-Disease"),
}  # fmt: skip
"""Names of the tags in the order of their ids, for data sets whose files hold ids alone."""
OTHER_NAMES = {"wnut_17": "wnut17", "ncbi-disease": "ncbi_disease"}
HUB_NAMES = {"wnut17": "leondz/wnut_17", "ncbi_disease": "ncbi/ncbi_disease"}
COLUMNS = ("tokens", "ner_tags")


@dataclass(frozen=True)
class Sentence:
    """Words, each with the id of its tag."""

    words: tuple[str, ...]
    tags: tuple[int, ...]


@dataclass(frozen=True)
class Tagged:
    """A task: `Sentence.tags` are indices into `label_names`."""

    label_names: tuple[str, ...]
    train: Sequence[Sentence]
    validation: Sequence[Sentence]
    test: Sequence[Sentence] = ()
    """Empty where the data set has none."""


def load_sentences(task: str, folder: Path | None, names: Sequence[str] = (), *, train: bool = True) -> Tagged:
    """A task from files or from the hub.

    :param task: wnut17, ncbi_disease, or any name: of files in `folder`, or of a data set of the hub.
    :param folder: with files train.*, validation.* or dev.*, and perhaps test.*; None for the hub.
    :param names: of the tags in the order of their ids; by default the data set's own.
    :param train: whether those for training are wanted; without, they may be missing.
    :raises DataError: naming the first row with words and tags that do not fit.
    """
    task = OTHER_NAMES.get(task, task)
    if folder is None:
        name = HUB_NAMES.get(task, task)
        found = hub_splits(name)
        if "train" not in found or "validation" not in found:
            raise DataError(f"{name} needs the splits train and validation; it has {', '.join(found)}")
        inner = getattr(found["train"].features.get(COLUMNS[1]), "feature", None)
        names = names or getattr(inner, "names", ())
        sides = [numbered(found.get(split, ()), f"{name}, {split}") for split in ("train", "validation", "test")]
    else:
        stems = (("train",), ("validation", "dev"), ("test",))
        needed = [train, True, False]
        sides = [read_split(folder, stem, required=need) for stem, need in zip(stems, needed, strict=True)]
    for where, row in (entry for side in sides for entry in side):
        check_row(row, where)
    label_names = tuple(names) or LABEL_NAMES.get(task) or names_in([row for side in sides for _, row in side], task)
    check_names(label_names)
    ids: dict[Any, int] = {name: index for index, name in enumerate(label_names)}
    return Tagged(label_names, *([sentence_of(row, ids, label_names, where) for where, row in side] for side in sides))


def check_row(row: Row, where: str) -> None:
    """Make sure that a row has words, and a tag for each of them.

    :param where: names the row in messages.
    :raises DataError: when it has not.
    """
    need_columns(row, COLUMNS, where)
    words, tags = (row[name] for name in COLUMNS)
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise DataError(f"{where}: 'tokens' must be a list of words, not {words!r}")
    if not isinstance(tags, list) or not all(isinstance(tag, str | int) for tag in tags):
        raise DataError(f"{where}: 'ner_tags' must be a list of tags, not {tags!r}")
    if len(words) != len(tags):
        raise DataError(f"{where}: there are {len(words)} tokens and {len(tags)} ner_tags; each token has one")


def names_in(rows: Sequence[Row], task: str) -> tuple[str, ...]:
    """Names of the tags where the rows have names: O first, the others in alphabetical order.

    :raises DataError: where rows have ids, whose names nobody knows.
    """
    found = {tag for row in rows for tag in row["ner_tags"]}
    if not all(isinstance(tag, str) for tag in found):
        raise DataError(
            f"the tags of {task!r} are ids, and their names are known only for {', '.join(LABEL_NAMES)}."
            f"{suggest(task, LABEL_NAMES)} "
            "Give --task, or the names in the order of the ids: --label-names O B-person I-person ..."
        )
    return ("O", *sorted(found - {"O"}))


def check_names(names: Sequence[str]) -> None:
    """Make sure that names of tags follow the IOB scheme, by which entities are told.

    :raises DataError: naming the first one that does not.
    """
    for name in names:
        if name != "O" and name[:2] not in ("B-", "I-"):
            raise DataError(f"the tag {name!r} is neither O nor B-KIND nor I-KIND, so that entities cannot be told")


def sentence_of(row: Row, ids: dict[Any, int], names: Sequence[str], where: str) -> Sentence:
    """Make a sentence of a row whose tags are names, or ids of these names.

    :raises DataError: for a tag that there is not.
    """
    for tag in row["ner_tags"]:
        if tag not in ids and not (isinstance(tag, int) and 0 <= tag < len(names)):
            kind = f"one of {', '.join(names)}" if isinstance(tag, str) else f"an id from 0 to {len(names) - 1}"
            raise DataError(f"{where}: the tag {tag!r} is not {kind}")
    return Sentence(tuple(row["tokens"]), tuple(ids.get(tag, tag) for tag in row["ner_tags"]))


def encode(
    sentences: Sequence[Sentence], tokenizer: Any, max_length: int
) -> tuple[list[dict[str, Any]], list[NDArray[np.int64]]]:
    """Tokenised rows, and for every word the index of its first token: -1 where it has none or was cut off.

    The first token of a word has its tag as the label, all others have -100, which no loss counts.

    :raises DataError: when the tokenizer does not tell which word a token is of.
    """
    if not tokenizer.is_fast:
        raise DataError("tags of words need a fast tokenizer (tokenizer.json), which this model does not have")
    rows, firsts = [], []
    for sentence in sentences:
        encoded = tokenizer(list(sentence.words), is_split_into_words=True, truncation=True, max_length=max_length)
        first = np.full(len(sentence.words), -1)
        labels = np.full(len(encoded["input_ids"]), IGNORED)
        for token, word in enumerate(encoded.word_ids()):
            if word is not None and first[word] < 0:
                first[word] = token
                labels[token] = sentence.tags[word]
        rows.append({**{name: encoded[name] for name in tokenizer.model_input_names}, "labels": labels})
        firsts.append(first)
    return rows, firsts


def entity_scores(
    sentences: Sequence[Sentence],
    firsts: Sequence[NDArray[np.int64]],
    predictions: NDArray[np.integer[Any]],
    names: Sequence[str],
) -> dict[str, float]:
    """Precision, recall and F1 of whole entities, as fractions: right is one with the right kind and both ends.

    :param firsts: as `encode` gives them; a word without a token counts as tagged O.
    :param predictions: [sentences, tokens], the id of a tag for each token.
    """
    from seqeval.metrics import f1_score, precision_score, recall_score

    expected = [[names[tag] for tag in sentence.tags] for sentence in sentences]
    found = [
        [names[row[token]] if token >= 0 else "O" for token in first]
        for row, first in zip(predictions, firsts, strict=True)
    ]
    scores = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
    return {name: float(score(expected, found, zero_division=0)) for name, score in scores.items()}


PEOPLE = ("Ada", "Boris", "Chen", "Dora", "Emil Novak", "Fatima Diallo", "Goran", "Hanna Maria Lind")
PLACES = ("Lima", "New York", "Quito", "Riga", "Rio de Janeiro", "Tunis")
PATTERNS = ("{person} lives in {place} .", "From {place} , {person} wrote a letter .", "Nobody went to {place} .")


def made_up(count: int, *, seed: int = 0) -> list[Sentence]:
    """Made-up sentences about people and places, tagged with `MADE_UP_NAMES`."""
    draw = random.Random(seed)
    sentences = []
    for _ in range(count):
        words: list[str] = []
        tags: list[int] = []
        for part in draw.choice(PATTERNS).split():
            first = {"{person}": 1, "{place}": 3}.get(part, 0)
            entity = draw.choice(PEOPLE if first == 1 else PLACES).split() if first else [part]
            words += entity
            tags += [first, *(first and first + 1 for _ in entity[1:])]
        sentences.append(Sentence(tuple(words), tuple(tags)))
    return sentences


MADE_UP_NAMES = ("O", "B-person", "I-person", "B-place", "I-place")

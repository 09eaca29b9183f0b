"""Questions of SQuAD 1.1 and 2.0, from files, from the hub, or made up."""

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from splits import Row, hub_splits, need_columns, numbered, read_split
from squad import Question

from cofiprune.cli.files import read_rows
from cofiprune.errors import DataError

HUB_NAMES = {False: "rajpurkar/squad", True: "rajpurkar/squad_v2"}
COLUMNS = ("id", "context", "question", "answers")


def load_questions(
    folder: Path | None, *, version_2: bool, train: bool = True
) -> tuple[list[Question], list[Question]]:
    """Training and validation questions.

    :param folder: with files train.* and validation.* or dev.* (Parquet, JSON, JSON lines); None for the hub.
    :param version_2: whether questions may have no answer, as in SQuAD 2.0.
    :param train: whether those for training are wanted; without, there are none.
    :raises DataError: naming the first row that is no question.
    """
    if folder is None:
        name = HUB_NAMES[version_2]
        splits = hub_splits(name)
        wanted = ("train", "validation") if train else ("validation",)
        sides = [numbered(splits[split], f"{name}, {split}") for split in wanted]
    else:
        end = "v2.0" if version_2 else "v1.1"  # as the original files are called
        stems = ((f"train-{end}", "train"), (f"dev-{end}", "validation", "dev"))
        sides = [read_split(folder, names, read_file) for names in stems[0 if train else 1 :]]
    found = [[question_of(row, where, version_2=version_2) for where, row in side] for side in sides]
    return found[0] if train else [], found[-1]


def read_file(file: Path) -> list[Row]:
    """The questions of a file: one a row, or nested in articles and paragraphs as SQuAD was published.

    :raises DataError: when it cannot be read.
    """
    if file.suffix == ".json":
        try:
            content = json.loads(file.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError):
            return read_rows(file)  # may hold an object a line, and explains what is wrong if it does not
        if isinstance(content, dict) and "data" in content:
            try:
                return list(_flattened(content["data"]))
            except (KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{file} is not nested as SQuAD is: {type(error).__name__} {error}") from error
    return read_rows(file)


def _flattened(articles: Iterable[dict[str, Any]]) -> Iterator[Row]:
    for article in articles:
        for paragraph in article["paragraphs"]:
            for entry in paragraph["qas"]:
                answers = {name: [answer[name] for answer in entry["answers"]] for name in ("text", "answer_start")}
                yield {
                    "id": entry["id"],
                    "title": article.get("title", ""),
                    "context": paragraph["context"],
                    "question": entry["question"],
                    "answers": answers,
                }


def question_of(row: Row, where: str, *, version_2: bool) -> Question:
    """Make a question of a row, once it is certain that its answers stand where they should.

    :param where: names the row in messages.
    :raises DataError: when a column is missing or of another kind, or an answer is not in the context at its place.
    """
    need_columns(row, COLUMNS, where)
    for name in ("context", "question"):
        if not isinstance(row[name], str) or not row[name].strip():
            raise DataError(f"{where}: {name!r} must be a text, not {row[name]!r}")
    context, answers = row["context"], row["answers"]
    texts, starts = (_list(answers, name) for name in ("text", "answer_start"))
    kinds = all(isinstance(text, str) for text in texts) and all(isinstance(start, int) for start in starts)
    if not isinstance(answers, dict) or len(texts) != len(starts) or not kinds:
        raise DataError(f"{where}: 'answers' must be {{'text': [...], 'answer_start': [...]}}, not {answers!r}")
    if not texts and not version_2:
        raise DataError(f"{where}: the question has no answer; --version-2-with-negative allows that, as in SQuAD 2.0")
    for text, start in zip(texts, starts, strict=True):
        there = context[start : start + len(text)] if start >= 0 else ""
        if not text or there != text:
            raise DataError(
                f"{where}: the answer {text!r} does not stand at character {start} of the context, but {there!r}"
            )
    return Question(str(row["id"]), context, row["question"], tuple(texts), tuple(map(int, starts)))


def _list(answers: Any, name: str) -> list[Any]:
    found = answers.get(name) if isinstance(answers, dict) else None
    return found if isinstance(found, list) else []


NAMES = ("Ada", "Boris", "Chen", "Dora", "Emil", "Fatima", "Goran", "Hanna")
PLACES = ("Lima", "Oslo", "Quito", "Riga", "Sofia", "Tunis", "Vienna", "Warsaw")
FILLER = ("The weather was fine.", "Nobody had asked about it.", "There was music in the street.")


def made_up(count: int, *, version_2: bool, seed: int = 0) -> list[Question]:
    """Questions on passages of a few made-up sentences; every third one has no answer in the manner of SQuAD 2.0."""
    draw = random.Random(seed)
    questions = []
    for index in range(count):
        names, places = draw.sample(NAMES, 3), draw.sample(PLACES, 3)
        sentences = [f"{name} lives in the city of {place}." for name, place in zip(names, places, strict=True)]
        sentences += draw.choices(FILLER, k=draw.randint(1, 12))
        draw.shuffle(sentences)
        context, answer = " ".join(sentences), (places[0],)
        if version_2 and index % 3 == 2:
            names[0], answer = next(name for name in NAMES if name not in names), ()
        starts = tuple(context.index(text) for text in answer)
        questions.append(Question(f"made-up-{index}", context, f"Where does {names[0]} live?", answer, starts))
    return questions

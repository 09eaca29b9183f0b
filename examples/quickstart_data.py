"""Text classification data for the quickstart that is on every machine: documentation strings.

`docstring_task` asks what a passage of documentation is about, of ten topics. Its text is on every
machine that can run the quickstart: the documentation strings of the standard library and of packages that
the project requires. Files are parsed with `ast`; nothing is imported or downloaded.
A module is wholly in training or wholly in validation, and a passage that occurs twice is kept
once, so that the score is not one of memory. The choice depends on names and text alone: one
installation always gives the same rows in the same order.
"""

import ast
import hashlib
import importlib.util
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path


class DataError(Exception):
    """Data that cannot be used; the message says what was looked for and what was found."""


@dataclass(frozen=True)
class Example:
    """One text, or a pair of texts, with its class."""

    text: str
    label: int
    pair: str | None = None
    source: str = ""
    """The module that a documentation string is from."""


@dataclass(frozen=True)
class TextTask:
    """A classification task: `Example.label` is an index into `label_names`."""

    label_names: tuple[str, ...]
    train: tuple[Example, ...]
    validation: tuple[Example, ...]

    def counts(self, examples: Sequence[Example]) -> list[int]:
        """Number of examples of each class, in the order of `label_names`."""
        found = Counter(example.label for example in examples)
        return [found[label] for label in range(len(self.label_names))]

    def majority_baseline(self) -> float:
        """Validation accuracy of always answering the class most frequent in training."""
        train = self.counts(self.train)
        return self.counts(self.validation)[train.index(max(train))] / len(self.validation)


TOPICS = {
    "algebra": "sympy.combinatorics sympy.ntheory sympy.polys numpy.polynomial",
    "arrays": "numpy._core numpy.fft numpy.lib numpy.linalg numpy.ma numpy.random",
    "distributed": "torch.distributed",
    "graphs": "networkx",
    "hub": "huggingface_hub",
    "internet": (
        "asyncio email ftplib html http imaplib ipaddress mailbox mimetypes poplib selectors "
        "smtplib socket socketserver ssl urllib webbrowser wsgiref xmlrpc"
    ),
    "models": "transformers.models.*.modeling_*",
    "physics": "sympy.physics",
    "preprocessing": (
        "transformers.models.*.feature_extraction_* transformers.models.*.image_processing_* "
        "transformers.models.*.processing_* transformers.models.*.tokenization_*"
    ),
    "schemas": "pydantic",
}
"""Class name -> modules, packages or patterns of names whose documentation is of that class.

All of them come with Python, torch, transformers or pydantic.
"""

PER_MODULE = 30
"""No more passages than this from one module, so that a class is more than a few long files."""
FEWEST_CLASSES = 8
PASSAGE_WORDS = (12, 44)
"""Sentences of a documentation string are joined until they have the first number of words."""


def docstring_task(train_per_class: int = 640, validation_per_class: int = 110) -> TextTask:
    """The task "what is this passage of documentation about", from this installation's files.

    A topic with less than half of the training examples that it should have is left out.
    """
    seen: set[str] = set()
    sizes = (validation_per_class, train_per_class)
    found = {name: _topic_passages(roots.split(), sizes, seen) for name, roots in TOPICS.items()}
    found = {name: sides for name, sides in found.items() if 2 * len(sides[1]) >= train_per_class}
    if len(found) < FEWEST_CLASSES:
        raise DataError(
            f"only {len(found)} of {len(TOPICS)} topics have enough documentation in this Python "
            f"installation ({', '.join(found)}); give files with --task and --data-dir instead"
        )
    rows: tuple[list[Example], list[Example]] = ([], [])
    for label, sides in enumerate(found.values()):
        for examples, passages in zip(rows, sides, strict=True):
            examples.extend(Example(text, label, source=module) for module, text in passages)
    validation, train = (tuple(sorted(side, key=lambda row: _digest(row.text))) for side in rows)
    return TextTask(tuple(found), train, validation)


Passages = list[tuple[str, str]]
"""Pairs of a module's name and a passage."""


def _topic_passages(roots: Sequence[str], sizes: Sequence[int], seen: set[str]) -> list[Passages]:
    """Passages of one topic that are not in `seen`, which they join: as many lists as sizes.

    Modules come in the order of a hash of their names: the first ones fill the first list, the ones
    after them the next, and when all are full the rest is not read.
    """
    files = {name: file for root in roots for name, file in _module_files(root).items()}
    modules = iter(sorted(files, key=_digest))
    sides: list[Passages] = []
    for size in sizes:
        side: Passages = []
        while len(side) < size and (module := next(modules, None)) is not None:
            side.extend((module, text) for text in _fresh(files[module], seen))
        sides.append(side[:size])
    return sides


def _fresh(file: Path, seen: set[str]) -> list[str]:
    """The first passages of a file that differ from those in `seen` in more than case and signs."""
    fresh: dict[str, str] = {}
    for text in _passages(file):
        key = re.sub(r"[^a-z]+", " ", text.lower()).strip()
        if key not in seen and len(fresh) < PER_MODULE:
            fresh.setdefault(key, text)
    seen.update(fresh)
    return list(fresh.values())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


NOT_ITS_OWN = {"test", "tests", "testing", "_vendor", "_vendored", "vendored", "__pycache__"}
"""Folders with tests or with copies of other packages."""


def _module_files(pattern: str) -> dict[str, Path]:
    """Names and files of the modules that are `pattern`, match it, or are inside it."""
    modules = _package_files(pattern.partition(".")[0])
    return {
        name: file for name, file in modules.items() if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
    }


@cache
def _package_files(name: str) -> dict[str, Path]:
    """Names and files of all modules of a top-level package, found without importing it."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return {}
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return {}
    if not spec.submodule_search_locations:
        return {name: Path(spec.origin)}
    folder = Path(spec.origin).parent
    files = {}
    for file in folder.rglob("*.py"):
        parts = file.relative_to(folder).with_suffix("").parts
        if not NOT_ITS_OWN.intersection(parts):
            files[".".join((name, *parts)).removesuffix(".__init__")] = file
    return files


NOT_PROSE = re.compile(r"\s+\S|>>>|\.\.|\||\+-|```|[-=~^*]{3}|[-*:@]|\d+[.)]")
"""How a line starts that is code, an option, a table, a heading's underline or a list."""


def _passages(file: Path) -> Iterator[str]:
    """Short passages of prose in the documentation strings of a file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the files of others
            tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    pending: list[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef] = [tree]
    while pending:
        node = pending.pop()
        yield from _join(_sentences(ast.get_docstring(node) or ""))
        pending += [
            inner for inner in node.body if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]


def _sentences(docstring: str) -> Iterator[str]:
    """The sentences of a documentation string, less code, lists, tables and markup."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        lines = paragraph.splitlines()
        if any(NOT_PROSE.match(line) for line in lines):
            continue
        text = " ".join(paragraph.split())
        text = re.sub(r":[\w:]+:`~?([^`<]+)[^`]*`", r"\1", text)  # :class:`~a.B` -> a.B
        text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)  # [word](address) -> word
        text = re.sub(r"[`*]+|https?://\S+|\[|\]", "", text)
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text):
            letters = sum(char.isalpha() or char == " " for char in sentence)
            if re.match(r"[A-Za-z].*[.!?]$", sentence) and letters > 0.85 * len(sentence):
                yield sentence


def _join(sentences: Iterable[str]) -> Iterator[str]:
    """Neighbouring sentences, joined into passages of about as many words as `PASSAGE_WORDS`."""
    fewest, most = PASSAGE_WORDS
    words: list[str] = []
    for sentence in sentences:
        words += sentence.split()
        if len(words) >= fewest:
            if len(words) <= most:
                yield " ".join(words)
            words = []

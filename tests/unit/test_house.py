"""Ratchets on the shape of the code: sizes of files and functions, and how often a run resolves the structure."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import cofiprune
from cofiprune.resolving import Resolver
from cofiprune.structure import Structure
from small import build

ROOT = Path(__file__).parents[2]
FILE_LINES = 350
FUNCTION_LINES = 50
RESOLVES = 4
FRONT_DOORS = {"export", "prune", "finetune", "prune_vocabulary", "teach"}
"""Their docstrings are the reference documentation of many arguments, and are not counted."""

SOURCES = sorted(path for folder in ("cofiprune", "adapters", "examples") for path in (ROOT / folder).rglob("*.py"))


def test_no_file_holds_more_than_one_idea() -> None:
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in SOURCES}
    assert SOURCES
    assert {str(path): lines for path, lines in lengths.items() if lines > FILE_LINES} == {}


def test_no_function_is_longer_than_a_screen() -> None:
    found = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if node.name in FRONT_DOORS:
                    lines -= len((ast.get_docstring(node) or "").splitlines())
                if lines > FUNCTION_LINES:
                    found[f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"] = lines
    assert found == {}


def test_a_run_resolves_the_structure_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve, calls = Resolver.structure, []

    def counted(self: Resolver) -> Structure:
        calls.append(1)
        return resolve(self)

    monkeypatch.setattr(Resolver, "structure", counted)
    model = build("BertForSequenceClassification", dtype=torch.float32)
    rows = [{"input_ids": [1 + n, 5, 7, 2], "attention_mask": [1] * 4, "labels": n % 2} for n in range(16)]
    cofiprune.prune(model, rows, target_sparsity=0.5, teacher="self", epochs=1, finetune_epochs=1, progress=False)
    assert 1 <= len(calls) <= RESOLVES


@pytest.mark.parametrize("page", ["docs/index.md", "mkdocs.yml"])
def test_every_decision_and_explanation_is_listed(page: str) -> None:
    pages = [path.name for folder in ("decisions", "explanation") for path in (ROOT / "docs" / folder).glob("*.md")]
    listed = (ROOT / page).read_text()
    assert len(pages) > 10
    assert [name for name in pages if name not in listed] == []

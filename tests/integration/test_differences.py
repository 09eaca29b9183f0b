"""The page of differences stays true: every row names tests, and every test that it names is there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "explanation" / "differences-from-cofi.md"
HEADER = ["in the original", "here", "shown by"]
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def rows_of(page: str) -> list[list[str]]:
    """All rows of all tables, without their headers."""
    lines = [cells(line) for line in page.splitlines() if line.startswith("|")]
    return [row for row in lines if row != HEADER and set("".join(row)) != {"-"}]


ROWS = rows_of(PAGE.read_text(encoding="utf-8"))


@cache
def names_in(path: Path) -> frozenset[str]:
    """Names of the tests that a file has: functions at its top, or methods of its test classes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef))]
    found = [node.name for body in bodies for node in body if isinstance(node, ast.FunctionDef)]
    return frozenset(name for name in found if name.startswith("test_"))


def missing(row: list[str]) -> list[str]:
    """What is wrong with a row: empty where it says both sides and names tests that exist."""
    if len(row) != len(HEADER) or not all(row):
        return [f"the row has {len(row)} cells, or empty ones"]
    named = NAMED.findall(row[-1])
    if not named or NAMED.sub("", row[-1]).strip(" ,"):
        return [f"the last cell must name tests, such as `unit/test_gates.py::test_name`, and has {row[-1]!r}"]
    return [
        f"there is no {file}::{name}"
        for file, name in named
        if not (TESTS / file).is_file() or name not in names_in(TESTS / file)
    ]


def test_the_page_has_its_tables() -> None:
    page = PAGE.read_text(encoding="utf-8")
    headers = [line for line in page.splitlines() if line.startswith("| in the original")]
    assert len(headers) == page.count("\n## ") >= 5
    assert all(cells(line) == HEADER for line in headers)
    assert len(ROWS) > 40
    assert len({row[0] for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:50])
def test_every_row_names_tests_that_exist(row: list[str]) -> None:
    assert missing(row) == []


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("| a | b |", "cells"),
        ("| a | | `unit/test_gates.py::test_initial_values_go_by_kind` |", "empty"),
        ("| a | b | nothing |", "must name tests"),
        ("| a | b | `unit/test_gates.py::test_initial_values_go_by_kind` and more |", "must name tests"),
        ("| a | b | `unit/test_gates.py::test_no_such_thing` |", "no unit/test_gates.py::test_no_such_thing"),
        ("| a | b | `unit/test_no_such_file.py::test_a` |", "no unit/test_no_such_file.py::test_a"),
        ("| a | b | `unit/test_gates.py::scattered` |", "no unit/test_gates.py::scattered"),
    ],
)
def test_a_row_that_names_no_test_is_found(line: str, complaint: str) -> None:
    assert complaint in "; ".join(missing(cells(line)))

"""The tables that `make bench` writes into a page."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench_tables import Table, about, check_place, places, rewritten, write

PAGE = """# Page

Prose before.

<!-- bench: steps -->
<!-- /bench -->

Prose between, with | a | table | of | its | own |.

<!-- bench: scale -->
<!-- cpu -->
2026-01-01, some CPU:

| | ratio |
| --- | --- |
| old | 1 |

<!-- gpu -->
2026-01-02, some GPU:

| | ratio |
| --- | --- |
| fast | 9 |

<!-- /bench -->

Prose after.
"""


def made(name: str = "steps", kind: str = "cpu", value: str = "2") -> Table:
    return Table(name, kind, ("", "ratio"), (("new", value),), "2026-02-02, a CPU")


def test_a_table_goes_into_its_place_and_nothing_else_changes() -> None:
    page = rewritten(PAGE, [made()])
    body = "<!-- cpu -->\n2026-02-02, a CPU:\n\n|  | ratio |\n| --- | --- |\n| new | 2 |\n\n"
    assert page == PAGE.replace("<!-- bench: steps -->\n", f"<!-- bench: steps -->\n{body}")


def test_a_run_on_a_cpu_leaves_the_tables_of_gpus() -> None:
    page = rewritten(PAGE, [made("scale")])
    assert "| old | 1 |" not in page
    assert "| new | 2 |" in page
    kept = PAGE[PAGE.index("<!-- gpu -->") :]
    assert page.endswith(kept)


def test_a_run_on_a_gpu_leaves_the_tables_of_cpus() -> None:
    page = rewritten(PAGE, [made("scale", "gpu")])
    assert "| fast | 9 |" not in page
    assert page.startswith(PAGE[: PAGE.index("<!-- gpu -->")])


def test_a_first_run_on_a_gpu_comes_after_the_cpu_whatever_came_first() -> None:
    one, other = made(), made(kind="gpu", value="3")
    assert rewritten(PAGE, [one, other]) == rewritten(PAGE, [other, one])


def test_the_same_rows_a_second_time_change_nothing() -> None:
    tables = [made(), made("scale"), made("scale", "gpu", "8")]
    once = rewritten(PAGE, tables)
    assert rewritten(once, tables) == once
    assert rewritten(once, [made(value="5")]) != once


def test_a_file_is_written_only_when_something_changed(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(PAGE, encoding="utf-8")
    write(path, [made()])
    assert path.read_text(encoding="utf-8") == rewritten(PAGE, [made()])
    path.chmod(0o444)
    before = path.stat().st_mtime_ns
    write(path, [made()])
    assert path.stat().st_mtime_ns == before


def test_a_table_without_a_place_is_an_error_that_names_it_and_the_others() -> None:
    with pytest.raises(ValueError, match="no place for table 'speed'.*tables: steps, scale"):
        rewritten(PAGE, [made("speed")])
    with pytest.raises(ValueError, match="no place for table 'speed'"):
        check_place(PAGE, "speed")


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (PAGE.replace("<!-- bench: scale -->\n", ""), "do not come as a pair"),
        (PAGE.replace("<!-- /bench -->\n", "", 1), "table 'steps' do not come as a pair"),
        (PAGE + "<!-- bench: last -->\n", "do not come as a pair"),
        (PAGE.replace("bench: scale", "bench: steps"), "two places for table 'steps'"),
    ],
)
def test_marks_that_do_not_fit_together(page: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        places(page)


def test_what_was_written_by_hand_between_the_marks_is_not_thrown_away() -> None:
    page = PAGE.replace("<!-- bench: steps -->\n", "<!-- bench: steps -->\nBy hand.\n")
    with pytest.raises(ValueError, match="'steps' belongs to no device: 'By hand.'"):
        rewritten(page, [made()])


def test_only_what_passed_and_was_measured_whole_is_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    names = ("passed", "failed", "partial", "raised")
    page.write_text("".join(f"<!-- bench: {name} -->\n<!-- /bench -->\n" for name in names), encoding="utf-8")
    folder = Path(__file__).parents[1] / "bench"
    shutil.copy(folder / "conftest.py", tmp_path)
    (tmp_path / "test_some.py").write_text(SOME, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tables", str(page), str(tmp_path)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert "3 failed, 2 passed" in done.stdout
    assert "no place for table 'elsewhere'" in done.stdout
    written = page.read_text(encoding="utf-8")
    assert "| of the passed |" in written
    assert "<!-- bench: passed -->\n<!-- cpu -->\n" in written
    assert written.count("<!-- cpu -->") == 1


SOME = """
import torch

def measured(table, name, whole=True):
    hand_in = table(name, on=torch.device("cpu"), whole=whole)
    hand_in(["a"], [[f"of the {name}"]])

def test_passed(table):
    measured(table, "passed")

def test_failed(table):
    measured(table, "failed")
    assert False

def test_partial(table):
    measured(table, "partial", whole=False)

def test_raised(table):
    measured(table, "raised")
    raise RuntimeError

def test_elsewhere(table):
    measured(table, "elsewhere")
"""


def test_rows_have_as_many_cells_as_the_header() -> None:
    with pytest.raises(ValueError, match="2 columns and a row of 3"):
        Table("steps", "cpu", ("", "ratio"), (("a", "b", "c"),), "now")
    with pytest.raises(ValueError, match="not of a 'tpu'"):
        made(kind="tpu")


def test_a_measurement_says_where_and_with_what_it_was_made() -> None:
    text = about(torch.device("cpu"), 2)
    assert f"torch {torch.__version__.partition('+')[0]}" in text
    assert ", 2 threads, " in text
    assert ", 1 thread, " in about(torch.device("cpu"), 1)


def test_every_benchmark_has_a_place_on_the_page_and_every_place_a_benchmark() -> None:
    root = Path(__file__).parents[2]
    known = places((root / "docs" / "benchmarks.md").read_text(encoding="utf-8"))
    sources = "".join(path.read_text(encoding="utf-8") for path in sorted((root / "tests" / "bench").glob("*.py")))
    handed_in = re.findall(r'^ +(?:hand_in = table\()?"([\w-]+)"(?:[,)]|: \w+_step,)', sources, re.MULTILINE)
    assert known
    assert set(known) - set(handed_in) == set()
    assert set(re.findall(r'^    hand_in = table\("([\w-]+)"', sources, re.MULTILINE)) - set(known) == set()

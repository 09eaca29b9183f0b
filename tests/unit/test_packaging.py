"""The packaging of two import roots, one of which lies in a folder that is not a package.

A slip here does not fail where it is made: a family without its entry point is merely "not supported", and a wheel
that lacks a root goes unnoticed in every checkout.
"""

import re
import subprocess
import sys
import tomllib
import zipfile
from configparser import ConfigParser
from email.parser import HeaderParser
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from cofiprune.versions import OLDEST, check

PROJECT = Path(__file__).resolve().parents[2]
ADAPTERS = PROJECT / "adapters"
ROOTS = {"cofiprune", "cofiprune_adapters"}


@pytest.fixture(scope="module")
def entry_points() -> dict[str, str]:
    """The declared adapters: model_type -> "module:attribute"."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["entry-points"]["cofiprune.adapters"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The wheel as hatchling builds it: path inside -> text."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


def test_adapters_folder_is_not_a_package() -> None:
    # With an __init__.py it would be importable as `adapters`, the name of a package on PyPI.
    assert not (ADAPTERS / "__init__.py").exists()


def test_every_family_file_has_an_entry_point_and_every_entry_point_a_file(entry_points: dict[str, str]) -> None:
    files = {f"cofiprune_adapters.{path.stem}" for path in (ADAPTERS / "cofiprune_adapters").glob("*.py")}
    modules = {value.partition(":")[0] for value in entry_points.values()}
    assert files - {"cofiprune_adapters.__init__"} == modules


def test_entry_points_are_named_by_model_types(entry_points: dict[str, str]) -> None:
    # adapter_for(model) looks a family up by config.model_type; a misspelt name would never be found.
    assert [name for name in entry_points if name not in CONFIG_MAPPING] == []


def test_wheel_has_exactly_the_two_roots(wheel: dict[str, str]) -> None:
    roots = {name.partition("/")[0] for name in wheel}
    assert {root for root in roots if not root.endswith(".dist-info")} == ROOTS


def test_wheel_has_every_source_file(wheel: dict[str, str]) -> None:
    sources = {
        path.relative_to(base).as_posix()
        for base, root in ((PROJECT, "cofiprune"), (ADAPTERS, "cofiprune_adapters"))
        for path in (base / root).rglob("*.py")
    }
    assert {name for name in wheel if name.endswith(".py")} == sources


def test_wheel_declares_the_adapters_and_the_command(wheel: dict[str, str], entry_points: dict[str, str]) -> None:
    declared = ConfigParser(delimiters="=")
    declared.read_string(dist_info(wheel, "entry_points.txt"))
    assert dict(declared["cofiprune.adapters"]) == entry_points
    assert dict(declared["console_scripts"]) == {"cofiprune": "cofiprune.cli:main"}


def test_a_plain_install_needs_six_packages(wheel: dict[str, str]) -> None:
    requirements = HeaderParser().parsestr(dist_info(wheel, "METADATA")).get_all("Requires-Dist", [])
    names = {line.partition(">=")[0].strip() for line in requirements if "extra ==" not in line}
    assert names == {"torch", "transformers", "accelerate", "safetensors", "pydantic", "rich"}


def dist_info(wheel: dict[str, str], file: str) -> str:
    """The text of one metadata file of the wheel."""
    (text,) = (text for name, text in wheel.items() if name.endswith(f".dist-info/{file}"))
    return text


@pytest.mark.parametrize(
    ("name", "there", "refused"),
    [
        ("transformers", "5.16.4", True),
        ("transformers", "4.57.1", True),
        ("transformers", "5.17.0", False),
        ("torch", "2.5.1+cu124", True),
        ("torch", "2.10.0a0+git12", False),
    ],
)
def test_releases_that_are_too_old_are_refused_in_one_line(name: str, there: str, refused: bool) -> None:
    versions = {"torch": "2.13.0", "transformers": "6.0.0", name: there}
    if not refused:
        check(versions.__getitem__)
        return
    with pytest.raises(ImportError, match=rf"^cofiprune needs {name} .*{re.escape(there)} is installed: pip install"):
        check(versions.__getitem__)


def test_the_oldest_releases_are_those_that_the_package_asks_for() -> None:
    stated = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    for name, oldest in OLDEST.items():
        assert f"{name}>={'.'.join(map(str, oldest))}" in stated

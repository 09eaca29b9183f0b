"""Adapters of other packages: found by their entry points, without an import, and named where they do not work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import PreTrainedModel

import cofiprune
from cofiprune.adapter import adapter_for, family, known_families, register_adapter
from cofiprune.errors import AdapterError
from cofiprune_adapters.bert import adapter as bert
from small import build

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "1.0"

[project.entry-points."cofiprune.adapters"]
{model_type} = "{value}"
"""
ADAPTER = """
from cofiprune import Adapter
from cofiprune_adapters.bert import adapter as bert


class TheirAdapter(Adapter):
    model_types = ("their-bert",)

    def describe(self, config):
        return bert.describe(config)


adapter = TheirAdapter()
"""
USE = """
import cofiprune
from transformers import BertConfig, BertModel


class TheirConfig(BertConfig):
    model_type = "their-bert"


class TheirModel(BertModel):
    config_class = TheirConfig


sizes = dict(vocab_size=40, hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=34)
model = TheirModel(TheirConfig(**sizes))
print(type(cofiprune.adapter.adapter_for(model)).__name__, dict(cofiprune.structure(model).sizes))
"""


def write_package(folder: Path, name: str, model_type: str, value: str, code: str) -> Path:
    """The sources of a package with one module, and one entry point."""
    folder.mkdir()
    module = name.replace("-", "_")
    (folder / "pyproject.toml").write_text(PROJECT.format(name=name, model_type=model_type, value=value))
    (folder / f"{module}.py").write_text(code)
    return folder


@pytest.mark.skipif(find_spec("pip") is None or find_spec("hatchling") is None, reason="pip and hatchling build it")
def test_an_installed_package_is_found_without_an_import(tmp_path: Path) -> None:
    source = write_package(tmp_path / "source", "their-adapters", "their-bert", "their_adapters:adapter", ADAPTER)
    site = tmp_path / "site"
    offline = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    install = [sys.executable, "-m", "pip", "install", *offline, "--target", str(site), str(source)]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    used = f"import sys\nsys.path.append({str(site)!r})\n{USE}"
    done = subprocess.run([sys.executable, "-c", used], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("TheirAdapter ")
    assert "'layers.0.heads': 4" in done.stdout


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a package on the path as an installer would: its module, and the metadata with its entry point."""

    def installed(name: str, code: str, value: str | None = None, *, model_type: str) -> None:
        site = tmp_path / name
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[cofiprune.adapters]\n{model_type} = {value or f'{name}:adapter'}\n")
        (site / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(str(site))

    return installed


BROKEN: dict[str, tuple[str, str | None, str]] = {
    "a module that cannot be imported": (
        "import a_package_that_is_not_there", None,
        "ModuleNotFoundError: No module named 'a_package_that_is_not_there'"),
    "a module that fails": ("raise RuntimeError('no licence')", None, "RuntimeError: no licence"),
    "no such module": ("", "their_missing:adapter", "No module named 'their_missing'"),
    "no such attribute": ("adaptor = None", None, "has no attribute 'adapter'"),
    "the class and no instance": (
        "from cofiprune import Adapter\nclass Theirs(Adapter): ...\nadapter = Theirs", None,
        "it is the class Theirs; the entry point has to name an instance of it"),
    "something else": ("adapter = {'bert': 1}", None, "it is a dict, not a cofiprune.Adapter"),
    "a module": (
        "from cofiprune_adapters.bert import adapter", "theirs_module", "it is a module, not a cofiprune.Adapter"),
}  # fmt: skip


@pytest.fixture
def bert_of() -> Callable[[str], PreTrainedModel]:
    """A BERT that says that it is of another model type."""

    def new(model_type: str) -> PreTrainedModel:
        model = build("BertModel")
        model.config.model_type = model_type
        return model

    return new


@pytest.mark.parametrize("case", BROKEN)
def test_an_entry_point_that_does_not_work_is_named(
    case: str, install: Callable[..., None], bert_of: Callable[..., PreTrainedModel]
) -> None:
    code, value, message = BROKEN[case]
    name = f"theirs_{case.split()[-1]}"
    install(name, code, value, model_type="their-bert")
    with pytest.raises(AdapterError) as caught:
        adapter_for(bert_of("their-bert"))
    text = str(caught.value)
    assert f"adapter of model type 'their-bert' that the package {name} names, {value or f'{name}:adapter'!r}" in text
    assert message in text
    assert "their-bert" in known_families()


def test_two_packages_for_one_model_type_are_both_named_until_one_is_registered(
    install: Callable[..., None], bert_of: Callable[..., PreTrainedModel]
) -> None:
    install("their_berts", "from cofiprune_adapters.bert import adapter", model_type="twofold")
    install("our_berts", "", "cofiprune_adapters.bert:adapter", model_type="twofold")
    with pytest.raises(AdapterError, match="2 packages name an adapter for model type 'twofold'") as caught:
        cofiprune.structure(bert_of("twofold"))
    assert "our_berts ('cofiprune_adapters.bert:adapter')" in str(caught.value)
    assert "their_berts ('their_berts:adapter')" in str(caught.value)
    assert "register_adapter" in str(caught.value)
    assert "twofold" in known_families()

    mine = family("twofold")(bert.describe)
    register_adapter(mine)
    assert adapter_for(bert_of("twofold")) is mine
    assert cofiprune.structure(bert_of("twofold")).sizes["layers.0.heads"] == 4


def test_packages_that_name_the_same_adapter_do_not_contradict_one_another(
    install: Callable[..., None], bert_of: Callable[..., PreTrainedModel]
) -> None:
    for name in ("one_package", "its_copied_metadata"):
        install(name, "", "cofiprune_adapters.bert:adapter", model_type="copied")
    assert adapter_for(bert_of("copied")) is bert


def test_an_adapter_that_is_registered_makes_its_family_known() -> None:
    assert "registered" not in known_families()
    register_adapter(family("registered")(bert.describe))
    assert "registered" in known_families()

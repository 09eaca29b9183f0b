"""Images: handwritten digits are read, split, learned and pruned."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForImageClassification

DIGITS = Path(__file__).resolve().parents[3] / "shared" / "data" / "digits"

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def vision(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("run_vision")


def test_images_are_the_same_from_either_source(vision: ModuleType) -> None:
    if not DIGITS.is_dir():
        pytest.skip("the real data is not here")
    pytest.importorskip("pyarrow")
    own, packaged = vision.load_images(str(DIGITS)), vision.load_images(None)
    pixels, again = (torch.stack([row["pixel_values"] for row in rows]) for rows in (own, packaged))
    assert pixels.shape == (1797, 1, 8, 8)
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert torch.equal(pixels, again)
    assert [row["labels"] for row in own] == [row["labels"] for row in packaged]
    parts = vision.split(list(range(1797)), tiny=False)
    assert {name: len(part) for name, part in parts.items()} == {"train": 1197, "validation": 200, "test": 400}
    assert len({index for part in parts.values() for index in part}) == 1797


def test_too_few_images_are_explained(vision: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "all.json").write_text(json.dumps([{"pixels": [0] * 64, "label": 1}]))
    with pytest.raises(SystemExit, match="1 images are too few"):
        vision.load_images(str(tmp_path))


def test_tiny_run_goes_through_all_steps(vision: ModuleType, tmp_path: Path) -> None:
    quick = ["--tiny", "--no-benchmark", "--teacher-epochs", "1", "--seed", "3"]
    vision.main([*quick, "--output-dir", str(tmp_path)])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["settings"]["seed"] == 3
    assert result["sparsity"] == pytest.approx(0.9, abs=0.005)

    # Measured again, from the files that it left.
    rows = vision.split(vision.load_images(None), tiny=True)["test"]
    model = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        found = model(torch.stack([row["pixel_values"] for row in rows])).logits.argmax(-1)
    right = (found == torch.tensor([row["labels"] for row in rows])).float().mean()
    assert result["pruned"]["test accuracy"] == pytest.approx(float(right))


@pytest.mark.slow
def test_a_fifth_of_the_layers_keeps_nearly_all_of_the_accuracy(vision: ModuleType, tmp_path: Path) -> None:
    vision.main(["--target-sparsity", "0.8", "--no-benchmark", "--output-dir", str(tmp_path)])
    result = json.loads((tmp_path / "result.json").read_text())
    dense, pruned = result["dense"]["test accuracy"], result["pruned"]["test accuracy"]
    assert dense > 0.95
    assert pruned > dense - 0.02
    assert result["sparsity"] == pytest.approx(0.8, abs=0.005)

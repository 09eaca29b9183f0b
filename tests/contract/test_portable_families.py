"""Folders of every family, in processes that cannot import cofiprune."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

SCRIPT = Path(__file__).parents[2] / "docs" / "reference" / "portable.py"
ROUNDED = dict.fromkeys(
    ("deberta", "dinov3_vit", "layoutlm", "mlcd_vision_model", "sapiens2", "umt5", "voxtral_encoder"), 1e-6
)
"""Families that compute in float32 inside, in one release or another."""
UNSAVED = {"chinese_clip_text_model"}
"""Families that transformers itself cannot save and load."""


@pytest.mark.slow
def test_every_family_loads_or_is_refused(tmp_path: Path) -> None:
    """Here, and with other releases of transformers where COFIPRUNE_PYTHONS names their interpreters."""
    others = os.environ.get("COFIPRUNE_PYTHONS", "").split()
    store = tmp_path / "portable.json"
    command = [sys.executable, str(SCRIPT), sys.executable, *others, "--store", str(store)]
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=env)
    found = json.loads(store.read_text())
    here = found[transformers.__version__]
    assert len(here) > 80
    for release, rows in found.items():
        for model_type, value in rows.items():
            if model_type in UNSAVED:
                continue
            if release == transformers.__version__:
                assert isinstance(value, float), (model_type, value)
            # Another release loads a folder or says that it does not.
            assert isinstance(value, str) or value <= ROUNDED.get(model_type, 1e-10), (release, model_type, value)

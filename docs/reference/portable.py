"""Load pruned folders of every family where cofiprune is not imported, with one release of transformers or several.

    python docs/reference/portable.py [--only MODEL_TYPE ...] [PYTHON ...]

A small random model of each class in `families.json` is pruned in three ways (an attention block gone, a whole layer
gone, neither; uneven heads, fewer hidden dimensions where it can) and saved. Each interpreter, by default this one,
loads the folders by the file in them. What comes out goes to `portable.json`, which `families.py` puts into its page.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

HERE = Path(__file__).parent


def save_all(folder: Path, only: list[str]) -> None:
    """Write pruned models, and what they compute in float64."""
    from families import models

    rows = json.loads((HERE / "families.json").read_text())
    for model_type, row in rows.items():
        if "classes" in row and (not only or model_type in only):
            for model in models(model_type):
                public = hasattr(transformers, type(model).__name__)  # of others there is no file
                if public and type(model).__name__ in row["classes"]:
                    _save(folder / model_type, model)


def _save(folder: Path, model: Any) -> None:
    import cofiprune
    from cofiprune.conformance.specimens import inputs, outputs, random_values, specimen

    generator = torch.Generator().manual_seed(0)
    sample = specimen(model, generator)
    last = len(cofiprune.structure(sample).layers) - 1
    with cofiprune.attach(sample) as masks:
        for name in masks:
            if len(masks[name]) > 1:
                values = random_values(len(masks[name]), generator, fractional=False)
                values[0], values[-1] = (0, 1) if name == f"layers.{last}.heads" else (1, 0)  # other heads in it
                masks[name] = values
        for number, gone in enumerate(
            (("layers.0.attention",), (f"layers.{last}.attention", f"layers.{last}.ffn"), ())
        ):
            masks.update({name: [float(name not in gone)] for name in masks if len(masks[name]) == 1})
            small = cofiprune.compact(sample)
            path = folder / f"{type(model).__name__}-{number}"
            small.save_pretrained(path, portable=True)
            batch = inputs(small, generator)
            torch.save((dict(batch), outputs(small, batch)), path / "wanted.pt")


def load_all(folder: Path) -> dict[str, Any]:
    """Load what `save_all` wrote; by model type the largest difference, relative to the outputs, or what went wrong."""
    sys.modules["cofiprune"] = None  # type: ignore[assignment]  # importing it is an error
    transformers.logging.set_verbosity_error()
    with contextlib.suppress(AttributeError):
        transformers.logging.disable_progress_bar()
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*/*")):
        before = found.get(path.parent.name, 0.0)
        try:
            difference: Any = _difference(path)
        except Exception as error:  # raised by another release's code, in any way
            said = re.sub(r"\S*/(?=\S+\.py)", "", f"{type(error).__name__}: {error}")  # without folders of this machine
            difference = " ".join(said.split())[-200:]
        worse = isinstance(before, float) and (not isinstance(difference, float) or not difference <= before)
        found[path.parent.name] = difference if worse else before
    return {"release": transformers.__version__, "found": found}


def _difference(path: Path) -> float:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    name = path.name.rpartition("-")[0]
    (file,) = path.glob("modeling_*_compacted.py")
    auto_map = json.loads((path / "config.json").read_text()).get("auto_map", {})
    autos = [auto for auto, cls in auto_map.items() if cls.endswith(f".{name}") and hasattr(transformers, auto)]
    own = f"{file.stem}.{name}"  # of a class that no Auto class stands for
    cls = getattr(transformers, autos[0]) if autos else get_class_from_dynamic_module(own, str(path))
    model = cls.from_pretrained(path, trust_remote_code=True, dtype=torch.float64)
    model.train(False)
    batch, wanted = torch.load(path / "wanted.pt")
    with torch.no_grad():
        output = model(**batch)
    difference = 0.0
    for key, value in wanted.items():
        name, _, place = key.partition(".")
        other = output[name][int(place)] if place else output[name]
        gap = float((value - other).abs().max() / value.abs().max().clamp(min=1))
        difference = gap if not gap <= difference else difference
    return difference


def main() -> None:
    """Save, load with each interpreter, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pythons", nargs="*", default=[sys.executable])
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--store", type=Path, default=HERE / "portable.json")
    parser.add_argument("--load", type=Path, help="only load the folders in this one, and print the result")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    if asked.load:
        print(json.dumps(load_all(asked.load)))
        return
    store = json.loads(asked.store.read_text()) if asked.store.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        save_all(Path(folder), asked.only)
        for python in asked.pythons:
            program = [python, __file__, "--load", folder]
            ran = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=True)
            result = json.loads(ran.stdout.splitlines()[-1])
            store.setdefault(result["release"], {}).update(result["found"])
            print(result["release"], len(result["found"]), flush=True)
    asked.store.write_text(json.dumps(store, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()

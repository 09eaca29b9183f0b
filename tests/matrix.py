"""Run the smoke tests with the oldest and the newest releases that are supported, each in an environment of its own.

    python tests/matrix.py [--only TEXT] [--keep] [--torch-args "--index-url ..."]

Interpreters are those of `PYTHONS` that are on the path; pyenv puts them there by PYENV_VERSION=3.11.7:3.12.1:3.13.0.
An environment is removed when its tests are done.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
TORCH = ("torch==2.6.*", "torch")
TRANSFORMERS = ("transformers==5.17.*", "transformers")
SMOKE = (
    "tests/laws", "tests/unit/test_old_files.py", "tests/unit/test_plan.py", "tests/unit/test_reads_leave_no_trace.py",
    "tests/integration/test_delivered_model.py", "tests/integration/test_training_rows.py",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="combinations whose name has this in it")
    parser.add_argument("--keep", action="store_true", help="keep the environments, for another run")
    parser.add_argument("--torch-args", default="", help="more arguments for pip when it installs torch")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "cofiprune-matrix")
    options = parser.parse_args()
    outcomes = {}
    for version, torch, transformers in itertools.product(PYTHONS, TORCH, TRANSFORMERS):
        name = f"Python {version}, {torch}, {transformers}"
        python = interpreter(version)
        if options.only in name:
            outcomes[name] = "not found" if python is None else run(python, torch, transformers, options)
            print(f"{name}: {outcomes[name]}", flush=True)
    print("\n" + "\n".join(f"{outcome:<10} {name}" for name, outcome in outcomes.items()))
    return int("failed" in outcomes.values() or "passed" not in outcomes.values())


def interpreter(version: str) -> str | None:
    """The interpreter on the path; a shim without a version behind it, as pyenv leaves them, is none."""
    python = shutil.which(f"python{version}")
    works = python is not None and not subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode
    return python if works else None


def run(python: str, torch: str, transformers: str, options: argparse.Namespace) -> str:
    """Set up an environment, run the smoke tests in it, and say what came of it."""
    folder = options.folder / re.sub(r"\W+", "-", f"{Path(python).name} {torch} {transformers}")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    try:
        # The build of torch goes first and alone: the others are resolved against it.
        for command in (
            [python, "-m", "venv", str(folder)],
            [*pip, torch, *options.torch_args.split()],
            [*pip, "--editable", f"{ROOT}[dev]", transformers, torch],
            [pip[0], "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *SMOKE],
        ):
            if subprocess.run(command, cwd=ROOT, check=False).returncode:
                return "failed"
        return "passed"
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())

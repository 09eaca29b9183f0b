"""A few of the trials that `make torture` makes by the thousand."""

import subprocess
import sys
from pathlib import Path

import pytest

TRIALS = {"kills.py": ("--trials", "12"), "fuzz.py": ("--cases", "400")}


@pytest.mark.slow
@pytest.mark.parametrize("program", TRIALS)
def test_nothing_is_lost_and_nothing_is_silent(program):
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name(program)), *TRIALS[program]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]

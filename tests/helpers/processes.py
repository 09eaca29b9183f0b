"""Python programs in processes of their own, alone or as one run of several."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

PREAMBLE = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
"""What lets a program import the helpers of the tests."""


def launch(program: str, *arguments: str, processes: int = 1) -> list[subprocess.Popen[str]]:
    """Start a program in some processes that train together, as `accelerate launch --cpu` does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true"}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + program, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"}
            | ({**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]


def outputs(running: list[subprocess.Popen[str]], code: int = 0) -> list[str]:
    """What the processes printed, once all of them have ended with a code."""
    texts = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [code] * len(running), "\n".join(texts)
    return texts

"""Draws ladder.svg from ladder.json: accuracy over processor minutes, a line for every target.

python docs/images/ladder.py
"""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure

HERE = Path(__file__).parent
COLOURS = {"0.60": "#2a6f97", "0.80": "#c8553d", "0.95": "#588157"}


def main() -> None:
    measured = json.loads((HERE / "ladder.json").read_text(encoding="utf-8"))
    rcParams["svg.fonttype"], rcParams["svg.hashsalt"] = "none", "ladder"  # the same file for the same figures
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axis = figure.subplots()
    axis.axhline(measured["dense"], color="#888888", linestyle=":", linewidth=1)
    axis.annotate(
        "dense", (0, measured["dense"]), xytext=(2, 3), textcoords="offset points", color="#666666", fontsize=8
    )
    for target, rungs in measured["targets"].items():
        line = [rung for rung in rungs if rung["line"]]
        minutes = [rung["minutes"] for rung in line]
        accuracy = [rung["accuracy"] for rung in line]
        axis.plot(minutes, accuracy, marker="o", color=COLOURS[target], label=f"{target} removed")
        for rung in rungs:
            if not rung["line"]:
                axis.plot(rung["minutes"], rung["accuracy"], marker="x", linestyle="", color=COLOURS[target])
            axis.annotate(
                rung["short"],
                (rung["minutes"], rung["accuracy"]),
                xytext=(4, -10),
                textcoords="offset points",
                fontsize=7,
            )
    axis.set_xlabel("processor minutes, one thread")
    axis.set_ylabel("accuracy, SST-2 validation")
    axis.grid(alpha=0.3)
    axis.set_xlim(0, 1.13 * max(rung["minutes"] for rungs in measured["targets"].values() for rung in rungs))
    axis.legend(frameon=False, loc="lower right")
    figure.savefig(HERE / "ladder.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()

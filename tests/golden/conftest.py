"""Compares the figures of a run with those recorded for it, or records them anew with `--record-golden`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cofiprune

FILE = Path(__file__).with_name("golden.json")
TOLERANCE, LOGIT_TOLERANCE = 1e-6, 1e-5
LEFT_OUT = ("seconds", "runtime", "per_second", "preparation_time", "train_loss")
"""Times, and the Trainer's mean over the steps of its last call."""
RESUMED = ", resumed"
"""In a name: the figures are those of the case named before it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-golden", action="store_true", help="write the figures of the golden cases that run")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Compare or record: `golden("cofi", result, batches)`, with the batches that the smaller model answers."""

    def compare(name: str, outcome: Any, batches: list[dict[str, Tensor]]) -> None:
        recorded = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
        found = json.loads(json.dumps(record(outcome, batches)))
        whole = name.partition(RESUMED)[0]
        if request.config.getoption("--record-golden") and whole == name:
            assert not hasattr(request.config, "workerinput"), "several processes would overwrite each other: -n 0"
            write({**recorded, name: found})
            return
        if whole not in recorded:
            pytest.fail(f"{name}: no figures are recorded; --record-golden records them", pytrace=False)
        first = difference(found, recorded[whole])
        if first is not None:
            pytest.fail(f"{name}: {first}", pytrace=False)

    return compare


def record(outcome: Any, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    """The figures of an outcome as plain values, in the order in which they come about."""
    if isinstance(outcome, cofiprune.SweepResult):
        return {f"{point.target:g}": figures(point, point.model, batches) for point in outcome}
    target = outcome.target
    return {
        "history": [numbers(entry) for entry in outcome.history],
        **figures(outcome, outcome.compact(), batches),
        "method": outcome.method,
        "target": None if target is None else short(target.reached),
        "model_sparsity": short(outcome.model_sparsity),
        "best_step": outcome.best_step,
    }


def figures(found: Any, small: Any, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    kept = {name: set(indices) for name, indices in found.plan.keep.items()}
    return {
        "keep": {
            name: "".join("01"[index in kept[name]] for index in range(size)) for name, size in found.plan.sizes.items()
        },
        "scale": {name: [short(value) for value in values] for name, values in found.plan.scale.items()},
        "sparsity": short(found.sparsity),
        "parameters": sum(value.numel() for value in small.parameters()),
        "metrics": numbers(found.metrics),
        "logits": [answers(small, batch) for batch in batches],
    }


def numbers(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: short(value) for name, value in entry.items() if not any(word in name for word in LEFT_OUT)}


def short(value: Any) -> Any:
    return float(f"{value:.10g}") if isinstance(value, float) else value


def answers(model: Any, batch: dict[str, Tensor]) -> list[float]:
    """What a model says to a batch; of states, those of the first token; of many numbers, their first 100."""
    with torch.no_grad():
        found = model.eval()(**batch)
    values = [value for name, value in found.items() if name.endswith("logits")] or [found["last_hidden_state"][:, 0]]
    return [round(number, 8) for value in values for number in value.flatten()[:100].tolist()]


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every single figure with the way to it."""
    if isinstance(value, Mapping | list):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def difference(found: dict[str, Any], recorded: dict[str, Any]) -> str | None:
    """The first figure that is not what was recorded."""
    ours, theirs = dict(leaves(found)), dict(leaves(recorded))
    for path in dict.fromkeys([*ours, *theirs]):
        one, other = ours.get(path, "missing"), theirs.get(path, "missing")
        same = one == other
        if isinstance(one, float) and isinstance(other, float):
            allowed = LOGIT_TOLERANCE if "logits" in path.split(".") else TOLERANCE
            same = one == pytest.approx(other, rel=TOLERANCE, abs=allowed)
        if not same:
            return f"{path} is {one}, recorded {other}"
    return None


def write(recorded: Mapping[str, Any]) -> None:
    """Write all cases, a line for each of their parts."""
    cases = []
    for name in sorted(recorded):
        parts = (
            f"{json.dumps(key)}: {json.dumps(part, separators=(',', ':'))}" for key, part in recorded[name].items()
        )
        cases.append(json.dumps(name) + ": {\n" + ",\n".join(parts) + "\n}")
    FILE.write_text("{\n" + ",\n".join(cases) + "\n}\n", encoding="utf-8")

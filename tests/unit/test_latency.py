"""Time as a cost: what the table says, exact and expected, kept on disk, and the target that is made of it."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cofiprune
from cofiprune.adapter import structure as structure_of
from cofiprune.data.synthetic import synthetic_inputs
from cofiprune.errors import TargetError
from cofiprune.latency import measuring
from cofiprune.latency.table import Conditions, LatencyCost, LatencyTable, Surface
from cofiprune.latency.target import CANDIDATES, _timed_multiple, best_multiple, cheapest, sizes_of, table_for
from cofiprune.plan import Plan
from cofiprune.selection.by_score import select
from cofiprune.selection.reachable import check_target
from cofiprune.selection.target import Target
from cofiprune.structure import Structure
from cofiprune.timing import cpu_threads, in_turn
from small import bert as new_bert

LARGER = {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 256}


bert = partial(new_bert, hidden_size=32, intermediate_size=64, vocab_size=50, max_position_embeddings=64)


def made_up(structure: Structure) -> LatencyTable:
    """Times of a device on which every block costs something by itself."""
    conditions = Conditions("device", 1, "torch", "float32", 1, 16, "Bert", {}, (4, 32))
    surfaces = {
        "layers.0.attention": Surface((1, 2, 4), ((300, 350, 400), (500, 700, 1100))),
        "layers.0.ffn": Surface((1, 16, 64), ((200, 250, 500), (300, 600, 1800))),
    }
    stands_for = {f"layers.{layer}.{kind}": f"layers.0.{kind}" for layer in range(2) for kind in ("attention", "ffn")}
    return LatencyTable(conditions, 2 * (1100 + 1800) + 400.0, (100, 400), surfaces, stands_for)


def test_times_are_added_and_interpolated() -> None:
    structure = structure_of(bert())
    cost = LatencyCost(made_up(structure), structure)
    sizes = structure.sizes
    assert cost.exact(sizes) == 2 * (1100 + 1800) + 400
    some = {**sizes, "layers.0.heads": 3, "layers.1.ffn": 0, "layers.0.intermediate": 40}
    assert cost.exact(some) == 400 + 900 + 1200 + 1100
    narrow = {**sizes, "hidden": 18}
    assert cost.exact(narrow) == 250 + 2 * (750 + 1150)
    assert cost.along(sizes, "layers.1.intermediate", [1, 16, 64]) == [
        cost.exact({**sizes, "layers.1.intermediate": size}) for size in (1, 16, 64)
    ]
    assert cost.along(sizes, "hidden", [4, 32]) == [cost.exact({**sizes, "hidden": size}) for size in (4, 32)]


def test_expected_times_are_the_exact_ones_at_whole_numbers_and_differentiable() -> None:
    structure = structure_of(bert())
    cost = LatencyCost(made_up(structure), structure)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        kept = {
            name: int(torch.randint(1, size + 1, (), generator=generator)) for name, size in structure.sizes.items()
        }
        kept["layers.1.ffn"] = int(torch.randint(2, (), generator=generator))
        kept["hidden"] = max(4, kept["hidden"])
        sizes = torch.tensor([float(kept[name]) for name in structure], dtype=torch.float64)
        assert float(cost.expected(sizes)) == pytest.approx(cost.exact(kept), abs=1)
    sizes = torch.tensor([0.7 * size for size in structure.sizes.values()], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cost.expected, sizes)
    cost.expected(sizes).backward()  # type: ignore[no-untyped-call]
    assert sizes.grad is not None
    assert bool((sizes.grad > 0).all())


def test_a_smaller_model_costs_what_the_plan_says() -> None:
    model = bert()
    structure = structure_of(model)
    table = made_up(structure)
    masks = {"layers.0.heads": torch.tensor([1.0, 0, 1, 1]), "layers.1.ffn": torch.zeros(1)}
    plan = Plan.from_values(structure, masks)
    small = structure_of(cofiprune.compact(model, plan))
    assert LatencyCost(table, small).exact(small.sizes) == LatencyCost(table, structure).exact(plan.kept)
    expected = LatencyCost(table, small).expected(torch.tensor(list(small.sizes.values()), dtype=torch.float64))
    assert float(expected) == pytest.approx(LatencyCost(table, small).exact(small.sizes), abs=1)


@pytest.mark.parametrize("speedup", [1.5, 3.0, 8.0])
def test_sizes_are_chosen_by_their_times(speedup: float) -> None:
    structure = structure_of(bert())
    table = made_up(structure)

    def cost(of: Structure) -> LatencyCost:
        return LatencyCost(table, of)

    total = cost(structure).exact(structure.sizes)
    target = Target.create("target_sparsity", 1 - 1 / speedup, cost, total)
    check_target(structure, target)
    scores = {name: torch.rand(group.size) for name, group in structure.items()}
    plan = select(structure, scores, target)
    assert total / cost(structure).exact(plan.kept) == pytest.approx(speedup, rel=0.05)
    with pytest.raises(TargetError, match="removing all that can go"):
        check_target(structure, target.at(1 - 1 / 100))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose times never vary; those of whole models are not what their blocks add up to."""

    def nanoseconds(model: Any) -> float:
        structure = structure_of(model)
        sizes = structure.sizes
        blocks = [
            2e5 + 900.0 * sizes["hidden"] * sizes[block.inner or ""] ** 0.8
            for block in structure.blocks
            if block.gate in structure
        ]
        return (5e5 + 1e4 * sizes["hidden"] + sum(blocks)) * (1 + 0.05 * len(blocks))

    def times_of(models: Any, conditions: Conditions, *, seconds: float = 1.0) -> Any:
        return np.array([[nanoseconds(each)] for each in models])

    monkeypatch.setattr(measuring, "times_of", times_of)
    monkeypatch.setattr("cofiprune.latency.target.times_of", times_of)


@pytest.mark.usefixtures("device")
def test_a_table_is_measured_kept_and_read(tmp_path: Path) -> None:
    model = bert()
    structure = structure_of(model)
    conditions = measuring.conditions_of(model, structure, batch_size=1, seq_len=16, cut_hidden=False)
    assert conditions.device
    before = {name: value.clone() for name, value in model.state_dict().items()}
    file = tmp_path / "table.json"
    table = table_for(model, structure, conditions, file)
    assert table.surfaces.keys() == {"layers.0.attention", "layers.0.ffn"}
    for surface in table.surfaces.values():
        assert surface.units[0] == 1
        assert list(surface.times[0]) == sorted(surface.times[0])
    assert LatencyTable.load(file, conditions) == table
    assert table_for(model, structure, conditions, file) == table
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    other = dataclasses.replace(table, conditions=dataclasses.replace(conditions, device="another device"))
    other.save(file)
    with pytest.raises(TargetError, match=r"device is another device there and .* here.*measure anew"):
        table_for(model, structure, conditions, file)
    file.write_text("{}", encoding="utf-8")
    with pytest.raises(TargetError, match="no latency table"):
        table_for(model, structure, conditions, file)


def test_in_a_folder_every_device_has_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    structure = structure_of(model)
    conditions = measuring.conditions_of(model, structure, batch_size=1, seq_len=16, cut_hidden=False)
    table = dataclasses.replace(made_up(structure), conditions=conditions)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("cofiprune.latency.target.measure", lambda model, structure, held: dataclasses.replace(
        table, conditions=held))  # fmt: skip
    for device in ("one", "two", "one"):
        here = dataclasses.replace(conditions, device=device)
        assert table_for(model, structure, here).conditions.device == device
    files = list((tmp_path / "cofiprune" / "latency").iterdir())
    assert sorted(json.loads(file.read_text())["conditions"]["device"] for file in files) == ["one", "two"]


def test_a_decision_is_measured_and_corrected() -> None:
    structure = structure_of(bert())
    table = made_up(structure)
    total = round(table.dense)

    def cost(of: Structure) -> LatencyCost:
        return LatencyCost(table, of)

    def really(model: Any) -> float:
        found = structure_of(model)
        return 1.3 * cost(found).exact(found.sizes)

    target = Target.create("target_sparsity", 0.5, cost, total, measure=really)
    scores = {name: torch.rand(group.size) for name, group in structure.items()}
    model = bert()
    plan = target.settle(lambda goal: select(structure, scores, goal), lambda plan: cofiprune.compact(model, plan))
    assert 1.3 * cost(structure).exact(plan.kept) == pytest.approx(target.budget, rel=0.02)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("units", [None, ("layer", "head", "intermediate")], ids=str)
@pytest.mark.parametrize("speedup", [1.5, 3.0])
def test_a_run_is_pruned_to_a_speed_up(speedup: float, units: Any, tmp_path: Path) -> None:
    model = bert(**LARGER)
    with pytest.warns(UserWarning, match="without data"):
        result = cofiprune.prune(model, target_speedup=speedup, units=units, latency_cache=str(tmp_path))
    assert result.target is not None
    assert result.target.name == "target_speedup"
    assert result.target.reached == pytest.approx(speedup, rel=0.03)
    assert "batch 1 and length 64" in str(result.target)
    assert result.plan.kept["hidden"] == 64 or units is None


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_latency_ms": 8, "method": "one-shot"},
        {"target_speedup": 2, "teacher": "self", "epochs": 1, "finetune_epochs": 1},
    ],
)
def test_a_run_on_data_ends_at_a_time(settings: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"input_ids": torch.randint(5, 50, (16,)), "labels": index % 2} for index in range(64)]
    result = cofiprune.prune(bert(**LARGER), rows, latency_cache=str(tmp_path), progress=False, **settings)
    assert result.target is not None
    assert result.target.reached == pytest.approx(next(iter(settings.values())), rel=0.03)


@pytest.mark.usefixtures("device")
def test_times_that_cannot_be_meant_are_errors(tmp_path: Path) -> None:
    settings = {"target_batch_size": 8, "target_seq_len": 32, "latency_cache": str(tmp_path / "t.json")}
    with pytest.raises(TargetError, match="takes .* ms .* already"):
        cofiprune.prune(bert(), target_latency_ms=1e6, **settings)
    with pytest.raises(TargetError, match="batch_size is 8 there and 4 here"):
        cofiprune.prune(bert(), target_speedup=1.5, **{**settings, "target_batch_size": 4})
    with pytest.raises(TargetError, match="above 1"):
        cofiprune.prune(bert(), target_speedup=0.5, **settings)


def pieces(piece: int, per_unit: float = 1.0) -> dict[int, float]:
    """Times on a device that takes units in pieces."""
    sizes = {size for each in CANDIDATES for size in sizes_of(each)}
    return {size: per_unit * piece * -(-size // piece) for size in sizes}


@pytest.mark.parametrize("piece", CANDIDATES)
def test_a_device_that_takes_units_in_pieces_gets_multiples_of_them(piece: int) -> None:
    assert cheapest(pieces(piece), CANDIDATES) == piece
    assert cheapest(pieces(1, 0.5), CANDIDATES) == 1, "where no size is better than another"
    assert all(size % piece == 0 for size in sizes_of(piece))
    assert not any(size % 8 == 0 for size in sizes_of(1))


def test_the_multiple_is_measured_once_and_is_never_coarser_than_the_blocks_allow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def counted(passes: Any, *args: Any, **settings: Any) -> Any:
        calls.append(len(passes))
        return in_turn(passes, *args, **{**settings, "seconds": 0.01})

    monkeypatch.setattr("cofiprune.latency.target.in_turn", counted)
    _timed_multiple.cache_clear()
    small, large = bert(intermediate_size=48), bert(intermediate_size=512)
    assert best_multiple(small, structure_of(small), rows=8) == 1
    found = {best_multiple(large, structure_of(large), rows=8) for _ in range(3)}
    assert len(found) == 1
    assert found <= set(CANDIDATES)
    assert len(calls) == 2


def test_auto_asks_for_the_multiple(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cofiprune.training.arguments.best_multiple", lambda *args, rows: 4)
    with pytest.warns(UserWarning, match="without data"):
        result = cofiprune.prune(bert(), target_sparsity=0.5, teacher="self", round_to="auto")
    assert result.plan.kept["layers.0.intermediate"] % 4 == 0
    assert result.plan.kept["hidden"] % 4 == 0
    assert abs(result.sparsity - 0.5) <= 0.005


@pytest.mark.slow
@pytest.mark.bench
@pytest.mark.parametrize("batch_size", [1, 32])
def test_this_machine(batch_size: int, tmp_path: Path) -> None:
    """The real thing, on a quiet machine."""
    model = bert(hidden_size=192, num_hidden_layers=4, intermediate_size=768)
    with cpu_threads(1):
        with pytest.warns(UserWarning, match="without data"):
            result = cofiprune.prune(model, target_speedup=3, target_batch_size=batch_size, latency_cache=str(tmp_path))
        small, whole = result.compact(), cofiprune.compact(model, Plan.from_values(structure_of(model), {}))
        inputs = synthetic_inputs(model, batch_size=batch_size, seq_len=64)
        with torch.inference_mode():
            ours, dense = in_turn(
                [partial(small, **inputs), partial(whole, **inputs)], model.device, seconds=20, own_time=True
            )
    assert np.median(dense) / np.median(ours) == pytest.approx(3, rel=0.05)


@pytest.mark.slow  # each size is exported
@pytest.mark.parametrize("engine", ["onnx", "onnx-int8", "openvino"])
def test_time_is_measured_in_the_engine_that_serves(engine: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino" if engine == "openvino" else "onnxruntime")
    model = bert()
    structure = structure_of(model)
    options: dict[str, Any] = {"batch_size": 1, "seq_len": 16, "cut_hidden": False}
    here = measuring.conditions_of(model, structure, **options, engine=engine)
    assert here.engine_version
    assert here != measuring.conditions_of(model, structure, **options)
    table = table_for(model, structure, here, tmp_path / "table.json")
    assert table.dense > 0
    assert LatencyTable.load(tmp_path / "table.json", here) == table
    (times,) = measuring.times_of([model], here, seconds=0.1)
    assert (times > 0).all()

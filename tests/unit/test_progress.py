"""Progress: one row for each phase with the time left, also in a notebook without widgets; short reprs, and pages."""

import sys
from types import ModuleType

import pytest

import cofiprune
from cofiprune.drawing import curves, structure_map
from cofiprune.training.environment import Display
from small import bert


def test_a_phase_is_one_row_however_often_it_goes_on():
    display = Display(enabled=False)
    for done in range(1, 28):
        display.begin("prune", total=28, done=done)
        display.reach(done + 1)
    display.begin("recover", total=4, done=0)
    assert [(task.description, task.completed, task.total) for task in display.tasks] == [
        ("prune", 28, 28),
        ("recover", 0, 4),
    ]


@pytest.mark.parametrize("enabled", [True, False])
def test_a_notebook_shows_text_in_one_place(enabled, monkeypatch, capsys):
    shown = []

    class Handle:
        def update(self, data, *, raw):
            shown.append(data["text/plain"])

    def display(data, *, raw, display_id):
        assert raw
        assert display_id
        shown.append(data["text/plain"])
        return Handle()

    module = ModuleType("IPython.display")
    module.display = display
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    progress = Display(enabled=enabled)
    with progress:
        progress.begin("prune", total=2, done=0)
        progress.show({"loss": 0.5, "expected_sparsity": 0.4, "target_sparsity": 0.5})
        progress.reach(1)
        progress.reach(2)
    assert bool(shown) == enabled
    if enabled:
        assert "2/2" in shown[-1]
        assert "loss 0.50 sparsity 0.40/0.50" in shown[-1]
        assert len(shown[-1].splitlines()) == 1
        assert max(map(len, shown[-1].splitlines())) <= 80
    assert capsys.readouterr() == ("", "")


def test_reprs_are_short_and_pages_are_pictures():
    model = bert(num_hidden_layers=12)
    structure = cofiprune.structure(model)
    plan = cofiprune.Plan.from_values(structure, {})
    for each in (structure, plan):
        assert len(repr(each)) < 120
        assert "48 heads" in repr(each)
        page = each._repr_html_()
        assert "<svg" in page
        assert page.count('class="heads"') == 48


def test_a_picture_of_what_is_gone_and_none_where_there_are_no_steps():
    sizes = {"hidden": 8, "layers.0.attention": 1, "layers.0.heads": 2, "layers.0.ffn": 1, "layers.0.intermediate": 4}
    kept = {**sizes, "layers.0.attention": 0, "layers.0.heads": 0, "layers.0.intermediate": 1}
    svg = structure_map(sizes, kept, {name: range(size) for name, size in kept.items()}).svg
    assert svg.count("removed</text>") == 1
    assert "1 of 4" in svg
    assert curves([{"phase": "one-shot", "step": 0, "sparsity": 0.5}], {}) is None
    history = [{"step": step, "loss": 1.0 / step, "eval_accuracy": 0.5} for step in (1, 2)]
    drawn = curves(history, {"eval_accuracy": 0.6}, 0.5)
    assert all(f">{title}</text>" in drawn.svg for title in ("training loss", "accuracy", "sparsity", "before"))

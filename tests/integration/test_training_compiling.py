"""Compiled training steps compute what the others do, and nothing of the compilation is left on the model."""

import copy

import pytest
import torch

import cofiprune
from cofiprune.errors import SettingsError

pytestmark = pytest.mark.filterwarnings("ignore:::torch")  # its own compiler warns of its own parts

BRIEF = {"epochs": 1, "finetune_epochs": 1, "batch_size": 16, "progress": False, "seed": 0, "logging_steps": 1}


def losses(result):
    return [entry["loss"] for entry in result.history if "loss" in entry]


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def _a_backend_that_fails():
    def broken(graph, inputs):
        raise RuntimeError("no compiler found")

    torch._dynamo.register_backend(broken, name="broken")


# With gates on the whole model, every step runs under a new sample of masks that are learned.
@pytest.mark.parametrize("settings", [{"one_shot_share": 0, "freeze_epochs": 0}, {"method": "one-shot"}])
def test_a_compiled_run_is_the_same_run(toy, settings):
    student = toy.student()
    results = [
        cofiprune.prune(
            copy.deepcopy(student), toy.rows(96, seed=1), target_sparsity=0.5, teacher=toy.teacher,
            **{**BRIEF, **settings, **more},
        )
        for more in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"})
    ]  # fmt: skip
    plain, compiled = results
    assert len(losses(plain)) == len(losses(compiled)) > 3
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-3)
    assert type(compiled.model) is type(student)
    assert compiled.model.state_dict().keys() == student.state_dict().keys()
    assert compiled.plan.keep == plain.plan.keep


def test_a_new_sample_of_the_gates_compiles_nothing_anew(toy):
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.register_backend(counting, name="counting")
    student = toy.student()
    settings = {**BRIEF, "one_shot_share": 0, "freeze_epochs": 0, "finetune_epochs": 0, "epochs": 4}
    cofiprune.prune(
        student, toy.rows(96, seed=1), target_sparsity=0.5, teacher=toy.teacher,
        torch_compile=True, torch_compile_backend="counting", **settings,
    )  # fmt: skip
    steps = 4 * 6
    # One for the first length, one for all others; a graph may be in a few parts.
    assert 1 <= len(graphs) < steps / 2


@pytest.mark.usefixtures("_a_backend_that_fails")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"torch_compile": True, "torch_compile_backend": "inducter"}, "did you mean 'inductor'"),
        ({"torch_compile_backend": "eager"}, "needs torch_compile=True"),
        ({"torch_compile": True, "torch_compile_backend": "broken"}, r"no compiler found.*C\+\+ compiler"),
    ],
)
def test_what_cannot_compile_is_known_before_anything_is_trained(toy, settings, words):
    student = toy.student()
    before = toy.snapshot(student)
    with pytest.raises(SettingsError, match=rf"(?i){words}"):
        cofiprune.finetune(student, toy.rows(16), epochs=1, progress=False, **settings)
    assert toy.is_unchanged(student, before)


@pytest.mark.slow
def test_inductor_trains_under_gates(toy):
    student = toy.student()
    result = cofiprune.prune(
        student, toy.rows(96, seed=1), target_sparsity=0.5, teacher=toy.teacher, torch_compile=True,
        **{**BRIEF, "one_shot_share": 0, "freeze_epochs": 0, "finetune_epochs": 0},
    )  # fmt: skip
    assert abs(result.sparsity - 0.5) < 0.005

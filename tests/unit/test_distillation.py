"""What the student learns from: the teacher's answers, and its layers matched to the student's."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput, QuestionAnsweringModelOutput, SequenceClassifierOutput

from cofiprune.distillation import (
    LayerMatch,
    Pooling,
    PredictionKind,
    hidden_projection,
    layer_losses,
    logit_loss,
    match_layers,
    predictions,
    teacher_layers,
)
from cofiprune.distillation import layerwise_loss as loss_of_states
from cofiprune.errors import SettingsError, TeacherError
from waiting import never_waiting

B, T, C = 3, 5, 4


def layerwise_loss(students, teachers, projection, *, layers=None, **settings):
    """The loss against the teacher's layers that are distilled by default."""
    chosen = teacher_layers(len(teachers)) if layers is None else layers
    some = {layer: teachers[layer] for layer in chosen}
    return loss_of_states(students, some, projection, teacher_depth=len(teachers), **settings)


MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
SHAPES: dict[PredictionKind, tuple[tuple[int, ...], ...]] = {
    "classification": ((B, C),),
    "token-classification": ((B, T, C),),
    "masked-lm": ((B, T, C),),
    "question-answering": ((B, T), (B, T)),
    "multi-label": ((B, C),),
    "regression": ((B, 2),),
    "embedding": ((B, T, C),),
}
WITH_TOKENS: list[PredictionKind] = ["token-classification", "masked-lm", "question-answering", "embedding"]
KINDS = list(SHAPES)
HOW: list[LayerMatch] = ["nearest", "ordered", "same-index"]


def answers(kind: PredictionKind, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES[kind])


def states(layers: int, width: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(layers, B, T, width, generator=generator))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_loss_is_zero_for_equal_answers_and_positive_for_others(
    kind: PredictionKind, mask: Tensor | None, temperature: float
) -> None:
    teacher = answers(kind, 0)
    assert logit_loss(teacher, teacher, temperature=temperature, kind=kind, mask=mask) == 0
    for seed in range(1, 6):
        assert logit_loss(answers(kind, seed), teacher, temperature=temperature, kind=kind, mask=mask) > 0


@pytest.mark.parametrize("kind", WITH_TOKENS)
@pytest.mark.parametrize("garbage", [1e4, -1e4, math.nan])
def test_padding_changes_nothing(kind: PredictionKind, garbage: float) -> None:
    teacher, student = answers(kind, 0), answers(kind, 1)
    clean = logit_loss(student, teacher, temperature=2.0, kind=kind, mask=MASK)
    spoilt = tuple(part.masked_fill((MASK == 0).view(B, T, *[1] * (part.dim() - 2)), garbage) for part in student)
    assert torch.allclose(logit_loss(spoilt, teacher, temperature=2.0, kind=kind, mask=MASK), clean)
    assert torch.allclose(logit_loss(student, teacher, temperature=2.0, kind=kind, mask=MASK.bool()), clean)


@pytest.mark.parametrize("kind", WITH_TOKENS)
def test_the_loss_is_that_of_the_batch_cut_to_its_tokens(kind: PredictionKind) -> None:
    teacher, student = answers(kind, 0), answers(kind, 1)
    mask = torch.tensor([1, 1, 1, 0, 0]).expand(B, T)
    cut = [tuple(part[:, :3] for part in parts) for parts in (student, teacher)]
    whole = logit_loss(student, teacher, temperature=2.0, kind=kind, mask=mask)
    assert torch.allclose(whole, logit_loss(*cut, temperature=2.0, kind=kind))


@pytest.mark.parametrize("kind", ["classification", "multi-label", "regression"])
def test_padding_says_nothing_about_answers_without_tokens_but_examples_can_be_left_out(kind: PredictionKind) -> None:
    teacher, student = answers(kind, 0), answers(kind, 1)
    whole = logit_loss(student, teacher, temperature=2.0, kind=kind)
    assert torch.equal(logit_loss(student, teacher, temperature=2.0, kind=kind, mask=MASK), whole)
    first_two = [tuple(part[:2] for part in parts) for parts in (student, teacher)]
    some = logit_loss(student, teacher, temperature=2.0, kind=kind, mask=torch.tensor([1, 1, 0]))
    assert torch.allclose(some, logit_loss(*first_two, temperature=2.0, kind=kind))


def test_classification_is_the_formula_of_the_original() -> None:
    (teacher,), (student,) = answers("classification", 0), answers("classification", 1)
    original = F.kl_div(F.log_softmax(student / 2, -1), F.softmax(teacher / 2, -1), reduction="batchmean") * 4
    assert torch.allclose(logit_loss(student, teacher, temperature=2.0, kind="classification"), original)


def test_regression_is_the_mean_squared_error_with_and_without_an_axis_of_its_own() -> None:
    (teacher,), (student,) = answers("regression", 0), answers("regression", 1)
    for ours, theirs in ((student, teacher), (student[:, 0], teacher[:, 0])):
        assert torch.allclose(logit_loss(ours, theirs, temperature=2.0, kind="regression"), F.mse_loss(ours, theirs))


def test_a_label_of_its_own_is_a_choice_between_two_classes() -> None:
    (teacher,), (student,) = answers("multi-label", 0), answers("multi-label", 1)
    two_classes = [torch.stack([part, torch.zeros_like(part)], -1) for part in (student, teacher)]
    per_label = logit_loss(*two_classes, temperature=2.0, kind="token-classification")
    assert torch.allclose(logit_loss(student, teacher, temperature=2.0, kind="multi-label"), per_label * C)


@pytest.mark.parametrize("kind", ["classification", "multi-label", "question-answering"])
def test_the_square_of_the_temperature_keeps_the_size_of_small_gradients(kind: PredictionKind) -> None:
    teacher = tuple(part * 1e-3 for part in answers(kind, 0))
    student = tuple(part * 1e-3 for part in answers(kind, 1))
    cold, hot = (logit_loss(student, teacher, temperature=t, kind=kind) for t in (1.0, 8.0))
    assert torch.allclose(cold, hot, rtol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_computed_in_single_and_the_teacher_gets_no_gradient(kind: PredictionKind) -> None:
    student = tuple(part.bfloat16().requires_grad_() for part in answers(kind, 1))
    teacher = tuple(part.bfloat16().requires_grad_() for part in answers(kind, 0))
    loss = logit_loss(student, teacher, temperature=2.0, kind=kind, mask=MASK)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(part.grad is None for part in teacher)
    assert all(part.grad is not None and part.grad.isfinite().all() for part in student)


def test_a_batch_without_valid_tokens_costs_nothing() -> None:
    for kind in WITH_TOKENS:
        loss = logit_loss(answers(kind, 1), answers(kind, 0), temperature=2.0, kind=kind, mask=torch.zeros(B, T))
        assert loss == 0


@pytest.mark.parametrize("how", ["mean", "cls"])
def test_embeddings_are_compared_by_the_direction_and_the_ranking_of_their_vectors(how: Pooling) -> None:
    ((student,), (teacher,)) = answers("embedding", 1), answers("embedding", 0)
    counts = MASK.sum(1).tolist() if how == "mean" else [1] * B
    ours, theirs = (
        F.normalize(torch.stack([row[:count].mean(0) for row, count in zip(part, counts, strict=True)]))
        for part in (student, teacher)
    )
    found, wanted = ((vectors @ theirs.T / 0.05).softmax(-1) for vectors in (ours, theirs))
    expected = (wanted * (wanted / found).log()).sum(-1).mean() + (1 - (ours * theirs).sum(-1)).mean()
    for scale in (1, 7):  # of no account
        loss = logit_loss(scale * student, teacher, temperature=2.0, kind="embedding", mask=MASK, pooling=how)
        assert torch.allclose(loss, expected)


def test_vectors_of_another_width_are_compared_by_their_ranking() -> None:
    ((teacher,),) = (answers("embedding", 0),)
    wider = torch.cat([teacher, torch.zeros_like(teacher)], -1)  # with the same similarities
    assert torch.allclose(logit_loss(wider, teacher, temperature=2.0, kind="embedding"), torch.zeros(()).double())
    assert logit_loss(wider + torch.rand_like(wider), teacher, temperature=2.0, kind="embedding") > 0


def test_answers_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(TeacherError, match="not the same task"):
        logit_loss(torch.zeros(B, 2), torch.zeros(B, 3), temperature=1.0, kind="classification")
    with pytest.raises(TeacherError, match="one class"):
        logit_loss(torch.zeros(B, 1), torch.zeros(B, 1), temperature=1.0, kind="classification")
    with pytest.raises(TeacherError, match="mask has shape"):
        logit_loss(torch.zeros(B, 7, 2), torch.zeros(B, 7, 2), temperature=1.0, kind="masked-lm", mask=MASK)
    with pytest.raises(TeacherError, match="mask has shape"):
        logit_loss(torch.zeros(B, 7), torch.zeros(B, 7), temperature=1.0, kind="question-answering", mask=MASK)
    with pytest.raises(SettingsError, match="temperature"):
        logit_loss(torch.zeros(B, 2), torch.zeros(B, 2), temperature=0.0, kind="classification")
    with pytest.raises(SettingsError, match="multi-label"):
        logit_loss(torch.zeros(B, 2), torch.zeros(B, 2), temperature=1.0, kind="ranking")  # type: ignore[arg-type]


def test_predictions_are_found_whatever_the_head() -> None:
    a, b = torch.zeros(B, T), torch.ones(B, T)
    loss = torch.zeros(())
    assert predictions(QuestionAnsweringModelOutput(loss=loss, start_logits=a, end_logits=b)) == (a, b)
    assert predictions(SequenceClassifierOutput(loss=loss, logits=a)) == (a,)
    assert predictions(BaseModelOutput(last_hidden_state=b)) == (b,)
    assert predictions({"loss": loss, "logits": a, "last_hidden_state": b}) == (a,)
    with pytest.raises(TeacherError, match="has loss; looked for start_logits"):
        predictions({"loss": loss})
    with pytest.raises(TeacherError, match="has tuple"):
        predictions((a,))


@pytest.mark.parametrize("depth", range(1, 49))
@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_teacher_layers_end_with_the_last_and_never_repeat(depth: int, count: int) -> None:
    chosen = teacher_layers(depth, count)
    assert len(chosen) == min(count, depth)
    assert list(chosen) == sorted(set(chosen))
    assert chosen[0] >= 0
    assert chosen[-1] == depth - 1
    gaps = torch.tensor((-1, *chosen)).diff()
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("numbers", [(0, 4), (12, 0)])
def test_no_layers_cannot_be_distilled(numbers: tuple[int, int]) -> None:
    with pytest.raises(SettingsError):
        teacher_layers(*numbers)


@pytest.mark.parametrize(("student", "teacher"), [(6, 6), (4, 6), (6, 4)])
def test_projection_starts_as_the_identity_on_what_both_have(student: int, teacher: int) -> None:
    x = torch.randn(2, student)
    both = min(student, teacher)
    expected = F.pad(x[:, :both], (0, teacher - both))
    assert torch.equal(hidden_projection(student, teacher)(x), expected)


def test_layer_losses_are_the_mean_squared_errors_of_all_pairs() -> None:
    students, teachers = states(3, 6, 0), states(2, 4, 1)
    projection = torch.nn.Linear(6, 4)
    losses = layer_losses(torch.stack(students), torch.stack(teachers), projection, MASK)
    real = MASK.bool()
    for row, teacher in zip(losses, teachers, strict=True):
        for loss, student in zip(row, students, strict=True):
            assert torch.allclose(loss, F.mse_loss(projection(student)[real], teacher[real]))
    assert not losses.requires_grad


def brute_force_ordered(losses: Tensor, alive: Tensor) -> list[int | None]:
    below, choices = len(alive), []
    for row in reversed(losses.tolist()):
        candidates = [layer for layer in range(below) if alive[layer]]
        choice = min(candidates, key=row.__getitem__) if candidates else None
        below = below if choice is None else choice
        choices.append(choice)
    return choices[::-1]


@pytest.mark.parametrize("seed", range(40))
def test_matching_takes_the_least_loss_among_layers_alive_in_order_where_asked(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(4, 8, generator=generator)
    alive = torch.rand(8, generator=generator) < seed / 40
    nearest, valid = match_layers(losses, alive, "nearest")
    assert valid.tolist() == [bool(alive.any())] * 4
    if alive.any():
        assert alive[nearest].all()
        assert torch.equal(losses.gather(1, nearest[:, None])[:, 0], losses[:, alive].amin(1))
    ordered, valid = match_layers(losses, alive, "ordered")
    found = [layer if ok else None for layer, ok in zip(ordered.tolist(), valid.tolist(), strict=True)]
    assert found == brute_force_ordered(losses, alive)
    assert (ordered[valid].diff() > 0).all()


@pytest.mark.parametrize(("student_depth", "teacher_depth"), [(12, 12), (6, 12), (12, 6), (4, 24), (5, 12), (1, 5)])
def test_same_index_keeps_the_relative_depth_and_the_order(student_depth: int, teacher_depth: int) -> None:
    layers = teacher_layers(teacher_depth)
    alive = torch.ones(student_depth, dtype=torch.bool)
    indices, valid = match_layers(None, alive, "same-index", layers=layers, num_teacher_layers=teacher_depth)
    assert valid.all()
    assert indices[-1] == student_depth - 1
    assert (indices.diff() >= 0).all()
    if student_depth == teacher_depth:
        assert tuple(indices.tolist()) == layers
    for layer, index in zip(layers, indices.tolist(), strict=True):
        assert abs((layer + 1) / teacher_depth * student_depth - (index + 1)) <= 0.5 or index == 0


def test_same_index_of_a_removed_layer_is_the_layer_whose_output_passes_there() -> None:
    alive = torch.tensor([False, True, True, False, False, True])
    indices, valid = match_layers(None, alive, "same-index", layers=(0, 2, 4, 5), num_teacher_layers=6)
    assert valid.tolist() == [False, True, True, True]
    assert indices[1:].tolist() == [2, 2, 5]


@pytest.mark.parametrize("how", HOW)
def test_with_no_layer_alive_the_loss_is_zero_and_differentiable(how: LayerMatch) -> None:
    projection = hidden_projection(4, 4)
    alive = torch.zeros(6, dtype=torch.bool)
    loss = layerwise_loss(states(6, 4, 0), states(6, 4, 1), projection, how=how, alive=alive)
    loss.backward()
    assert loss == 0
    assert torch.equal(projection.weight.grad, torch.zeros(4, 4))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("depth", "width"), [(6, 4), (3, 4), (12, 4), (6, 3), (6, 7)])
def test_layerwise_loss_is_the_sum_over_its_matches_for_any_depth_and_width(
    how: LayerMatch, depth: int, width: int
) -> None:
    students, teachers = states(depth, width, 0), states(6, 4, 1)
    projection = hidden_projection(width, 4)
    alive = torch.arange(depth) % 3 != 1
    layers = teacher_layers(6)
    losses = layer_losses(torch.stack(students), torch.stack(teachers)[list(layers)], projection, MASK)
    indices, valid = match_layers(losses, alive, how, layers=layers, num_teacher_layers=6)
    matched = losses.gather(1, indices[:, None])[:, 0][valid]
    loss = layerwise_loss(students, teachers, projection, how=how, mask=MASK, alive=alive)
    assert torch.allclose(loss, matched.sum())


@pytest.mark.parametrize("how", HOW)
def test_a_copy_of_the_teacher_matches_itself_without_loss(how: LayerMatch) -> None:
    teachers = states(8, 4, 0)
    assert layerwise_loss(teachers, teachers, hidden_projection(4, 4), how=how, mask=MASK) == 0


@pytest.mark.parametrize("how", HOW)
def test_padded_states_change_neither_match_nor_loss(how: LayerMatch) -> None:
    students, teachers = states(6, 4, 0), states(6, 4, 1)
    spoilt = [state.masked_fill((MASK == 0)[..., None], 1e4) for state in students]
    clean, changed = (
        layerwise_loss(each, teachers, hidden_projection(4, 4), how=how, mask=MASK) for each in (students, spoilt)
    )
    assert torch.equal(clean, changed)


def test_the_last_layer_alone_at_the_same_index_is_the_loss_of_the_final_states() -> None:
    students, teachers = states(3, 4, 0), states(6, 4, 1)
    loss = layerwise_loss(students, teachers, hidden_projection(4, 4), how="same-index", mask=MASK, layers=(5,))
    assert torch.allclose(loss, F.mse_loss(students[-1][MASK.bool()], teachers[-1][MASK.bool()]))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_gradients_reach_the_projection_and_the_matched_states_alone(precision: torch.dtype) -> None:
    students = [state.requires_grad_() for state in states(6, 4, 0)]
    teachers = [state.to(precision).requires_grad_() for state in states(6, 4, 1)]
    projection = hidden_projection(4, 4)
    alive = torch.tensor([True, False, True, True, False, True])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
        loss = layerwise_loss(students, teachers, projection, how="ordered", alive=alive)
    loss.backward()
    assert loss.dtype == torch.float32
    assert projection.weight.grad.abs().sum() > 0
    assert all(state.grad is None for state in teachers)
    assert all((state.grad == 0).all() for state, lives in zip(students, alive, strict=True) if not lives)
    assert any((state.grad != 0).any() for state in students)


def test_a_student_in_half_precision_is_projected_in_single() -> None:
    students, teachers = ([state.bfloat16() for state in states(6, 4, seed)] for seed in (0, 1))
    loss = layerwise_loss(students, teachers, hidden_projection(4, 4), how="nearest")
    wide = [[state.float() for state in each] for each in (students, teachers)]
    assert torch.equal(loss, layerwise_loss(*wide, hidden_projection(4, 4), how="nearest"))


def test_layers_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(TeacherError, match=r"\[3, 5, 4\] and the teacher's \[3, 4, 4\]"):
        layerwise_loss(states(2, 4, 0), [s[:, :4] for s in states(2, 4, 1)], hidden_projection(4, 4), how="nearest")
    for how in ("nearest", "same-index", "v4"):
        with pytest.raises(SettingsError, match=f"{how}.*nearest, ordered, same-index"):
            match_layers(None, torch.ones(3, dtype=torch.bool), how)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("how", HOW)
def test_nothing_in_a_step_waits_for_the_device(how: LayerMatch) -> None:
    students = [state.cuda().requires_grad_() for state in states(6, 4, 0)]
    teachers = [state.cuda() for state in states(6, 4, 1)]
    projection, mask, alive = hidden_projection(4, 4).cuda(), MASK.cuda(), torch.ones(6, device="cuda") > 0
    parts = {kind: tuple(part.cuda() for part in answers(kind, 0)) for kind in KINDS}
    with never_waiting():
        layerwise_loss(students, teachers, projection, how=how, mask=mask, alive=alive).backward()
        for kind, part in parts.items():
            logit_loss(part, part, temperature=2.0, kind=kind, mask=mask)

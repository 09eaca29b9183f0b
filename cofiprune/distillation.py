"""Distillation losses: the teacher's predictions, and the states of some of its layers.

Predictions are matched in distribution (Hinton et al., 2015, arXiv:1503.02531). The outputs of a few teacher layers are
matched by the nearest student layers that still exist (CoFi, Xia et al., 2022, arXiv:2204.00408). Padding never counts.
No function waits for the device.

Shapes: B examples, T tokens, C classes, Hs and Ht hidden size of student and teacher, Ls and Lt their layers, S the
distilled teacher layers. Layers count from 0, without the embeddings; a layer's state is its output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cofiprune.errors import SettingsError, TeacherError

PredictionKind = Literal[
    "classification",
    "token-classification",
    "question-answering",
    "regression",
    "multi-label",
    "embedding",
    "masked-lm",
    "multiple-choice",
    "other",
]
LayerMatch = Literal["nearest", "ordered", "same-index"]
Pooling = Literal["mean", "cls"]

_SHARPNESS = 0.05
"""Temperature of the softmax over a batch's similarities."""
_FIELDS = (
    ("start_logits", "end_logits"),
    ("logits",),
    ("prediction_logits",),
    ("last_hidden_state",),
    ("pooler_output",),
)


def predictions(output: Any, order: Sequence[int] | None = None) -> tuple[Tensor, ...]:
    """Return the predictions of a `ModelOutput` of transformers, or a dict like it.

    These are the first that it has of: start_logits and end_logits, logits, prediction_logits, last_hidden_state,
    pooler_output.

    :param order: the places of the classes in the order in which they are wanted; None for as they are.
    :raises TeacherError: if it has none of them.
    """
    fields = output if isinstance(output, Mapping) else {}
    for names in _FIELDS:
        if all(isinstance(fields.get(name), Tensor) for name in names):
            found = tuple(fields[name] for name in names)
            return found if order is None else tuple(part[..., list(order)] for part in found)
    present = ", ".join(map(str, fields)) or type(output).__name__
    wanted = ", ".join(" + ".join(names) for names in _FIELDS)
    raise TeacherError(f"cannot tell what this model predicts: its output has {present}; looked for {wanted}")


def logit_loss(
    student: Tensor | tuple[Tensor, ...],
    teacher: Tensor | tuple[Tensor, ...],
    *,
    temperature: float,
    kind: PredictionKind,
    mask: Tensor | None = None,
    pooling: Pooling = "mean",
) -> Tensor:
    """Return the distance of the student's predictions from the teacher's: a scalar, 0 where they are equal.

    | kind | prediction | loss |
    |---|---|---|
    | classification, multiple-choice | logits [B, C] | KL(teacher || student), mean over B |
    | token-classification, masked-lm | logits [B, T, C] | the same, mean over tokens |
    | question-answering | start and end logits [B, T] | the same over positions, mean of the two |
    | multi-label | logits [B, C] | KL of one Bernoulli per label, sum over C, mean over B |
    | regression, other | scores [B, ...] | squared error, mean |
    | embedding | states [B, T, H] or vectors [B, H] | see `vector_loss`, of the states' vectors |

    A KL is taken at `temperature` and multiplied by its square, which keeps the size of its gradient (Section 2.1 of
    arXiv:1503.02531).

    :param student: a tensor, or the result of `predictions`.
    :param teacher: of the same shape, but for embeddings' width; no gradient flows into it.
    :param temperature: above 0; not used by regression and embedding.
    :param mask: [B, T], not 0 at real tokens (masked-lm: or at those to predict); ignored by losses without a token
        axis, which take [B], not 0 at real examples. None counts everything.
    :param pooling: how an embedding's token states make a vector, see `pooled`.
    :raises TeacherError: if shapes differ, a mask does not fit, or there is a single class.
    :raises SettingsError: for an unknown kind or a temperature that is not positive.
    """
    if kind not in get_args(PredictionKind):
        raise SettingsError(f"unknown kind {kind!r}; choose among {', '.join(get_args(PredictionKind))}")
    if not temperature > 0:
        raise SettingsError(f"temperature is {temperature}; it must be above 0")
    students = (student,) if isinstance(student, Tensor) else student
    teachers = (teacher,) if isinstance(teacher, Tensor) else teacher
    if kind == "embedding":
        return vector_loss(pooled(_wide(students[0]), mask, pooling), pooled(_wide(teachers[0]), mask, pooling), mask)
    ours, theirs = ([list(part.shape) for part in parts] for parts in (students, teachers))
    if ours != theirs:
        raise TeacherError(f"the student predicts {ours} and the teacher {theirs}: not the same task")
    if ours[0][-1] == 1 and kind in ("classification", "multiple-choice", "token-classification", "masked-lm"):
        raise TeacherError(f"{kind} with one class: its softmax is always 1; if it is a score, it is a regression")
    losses = [
        _prediction_loss(_wide(part), _wide(target.detach()), temperature=temperature, kind=kind, mask=mask)
        for part, target in zip(students, teachers, strict=True)
    ]
    return torch.stack(losses).mean()


def _prediction_loss(
    student: Tensor, teacher: Tensor, *, temperature: float, kind: PredictionKind, mask: Tensor | None
) -> Tensor:
    if kind in ("regression", "other"):
        return _mean_over(mask, (student - teacher).square().reshape(len(student), -1).mean(-1))
    student, teacher = student / temperature, teacher / temperature
    if kind == "multi-label":
        on = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
        off = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
        return _mean_over(mask, (on + off).sum(-1)) * temperature**2
    if kind == "question-answering" and mask is not None and mask.dim() == 2:
        _require_shape(mask, student.shape)
        # The lowest number has a softmax of 0, as -inf has, but -inf would make the padding's term 0 * (inf - inf).
        lowest = torch.finfo(student.dtype).min
        student, teacher = student.masked_fill(mask == 0, lowest), teacher.masked_fill(mask == 0, lowest)
    divergence = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    return _mean_over(mask, divergence) * temperature**2


def pooled(states: Tensor, mask: Tensor | None = None, how: Pooling = "mean") -> Tensor:
    """Return the vectors [B, H] of texts: the mean of their token states, or the first one ("cls").

    :param states: [B, T, H]; vectors [B, H] are returned as they are.
    :param mask: [B, T], not 0 at real tokens; None for all.
    """
    if states.dim() < 3:
        return states
    if how == "cls":
        return states[:, 0]
    if mask is None:
        return states.mean(1)
    _require_shape(mask, states.shape[:2])
    valid = (mask != 0).unsqueeze(-1)
    return states.masked_fill(~valid, 0.0).sum(1) / valid.sum(1).clamp(min=1)


def vector_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return how far the vectors of some texts are from the teacher's, in direction and to each other: 0 if equal.

    One part is the mean of 1 - cosine of each vector with the teacher's; where widths differ there is none. The other
    compares rankings, as SEED does (Fang et al., 2021, arXiv:2101.04731): the KL(teacher || student) of the softmax, at
    a temperature of 0.05, of a text's cosines with the teacher's vectors of the batch, or with the student's own
    where widths differ. So a student's query finds what the teacher has indexed.

    :param student: [B, Hs].
    :param teacher: [B, Ht]; no gradient flows into it.
    :param mask: [B], not 0 at real examples; None, or one of tokens, for all.
    """
    ours, theirs = F.normalize(student, dim=-1), F.normalize(teacher.detach(), dim=-1)
    alike = ours.shape == theirs.shape
    target = (theirs @ theirs.T / _SHARPNESS).log_softmax(-1)
    found = (ours @ (theirs if alike else ours).T / _SHARPNESS).log_softmax(-1)
    loss = F.kl_div(found, target, log_target=True, reduction="none").sum(-1)
    if alike:
        loss = loss + (ours - theirs).square().sum(-1) / 2
    return _mean_over(mask, loss)


def _wide(states: Tensor) -> Tensor:
    return states.float() if states.dtype in (torch.float16, torch.bfloat16) else states


def _require_shape(mask: Tensor, shape: Sequence[int]) -> None:
    if list(mask.shape) != list(shape):
        raise TeacherError(f"the mask has shape {list(mask.shape)}; the predictions or states need {list(shape)}")


def _mean_over(mask: Tensor | None, losses: Tensor) -> Tensor:
    """Return the mean of [B] or [..., B, T] losses over B and T where the mask is not 0; 0 if it is 0 everywhere."""
    axes = (-1,) if losses.dim() == 1 else (-2, -1)
    if mask is None or (losses.dim() == 1 and mask.dim() == 2):
        return losses.mean(axes)
    _require_shape(mask, losses.shape[-len(axes) :])
    valid = mask != 0
    return losses.masked_fill(~valid, 0.0).sum(axes) / valid.sum().clamp(min=1)


def teacher_layers(num_teacher_layers: int, count: int = 4) -> tuple[int, ...]:
    """Choose `count` teacher layers to distil, or all if there are fewer, evenly spaced up to the last as in CoFi.

    :raises SettingsError: if a number is below 1.

    >>> teacher_layers(12), teacher_layers(6), teacher_layers(2)
    ((2, 5, 8, 11), (1, 2, 4, 5), (0, 1))
    """
    if num_teacher_layers < 1 or count < 1:
        raise SettingsError(f"cannot choose {count} of {num_teacher_layers} teacher layers")
    count = min(count, num_teacher_layers)
    return tuple(_rounded(number * num_teacher_layers, count) - 1 for number in range(1, count + 1))


def _rounded(numerator: int, denominator: int) -> int:
    """Return the integer nearest to a positive fraction, halves up."""
    return (2 * numerator + denominator) // (2 * denominator)


def hidden_projection(student_width: int, teacher_width: int) -> nn.Linear:
    """Return the linear layer W from student to teacher states: weight [Ht, Hs], bias 0; it is dropped after training.

    It starts as the identity, cut or padded with zeros where the widths differ.
    """
    projection = nn.Linear(student_width, teacher_width)
    nn.init.eye_(projection.weight)
    nn.init.zeros_(projection.bias)
    return projection


@torch.no_grad()
def layer_losses(
    student_states: Tensor, teacher_states: Tensor, projection: nn.Linear, mask: Tensor | None = None
) -> Tensor:
    """Return the mean squared error [S, Ls] of every projected student state against every teacher state, no gradient.

    :param student_states: [Ls, B, T, Hs]; under masks, 0 in removed hidden dimensions.
    :param teacher_states: [S, B, T, Ht].
    :param mask: [B, T], not 0 at real tokens; None for all.
    :raises TeacherError: if the shapes do not fit.
    """
    # Detached, because autocast of older torch versions keeps the copy that it casts without gradients, and
    # would reuse it for the projection of the matched states.
    projected = _project(student_states, projection.weight.detach(), projection.bias.detach())
    return torch.stack([_state_errors(projected, state, mask) for state in teacher_states.unbind()])


def _project(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(states.to(weight.dtype), weight, bias)


def _state_errors(projected: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean squared errors [...] of [..., B, T, Ht] states over real tokens."""
    ours, theirs = list(projected.shape[-3:]), list(teacher.shape[-3:])
    if ours != theirs:
        raise TeacherError(f"the student's projected states are {ours} and the teacher's {theirs}")
    return _mean_over(mask, (projected - _wide(teacher.detach())).square().mean(-1))


def match_layers(
    losses: Tensor | None, alive: Tensor, how: LayerMatch, *, layers: Sequence[int] = (), num_teacher_layers: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the student layer of every chosen teacher layer: (indices [S], valid [S]).

    "nearest" takes the smallest loss among the layers alive. "ordered" does the same from the last teacher layer down,
    each time strictly below the previous choice. "same-index" takes the layer at the same depth,
    round((l + 1) Ls / Lt) - 1, or the next one alive below it, whose output is the state at that depth. A teacher layer
    without a candidate is not valid, and its index has no meaning.

    :param losses: [S, Ls], see `layer_losses`; not used by "same-index".
    :param alive: [Ls] bool, true where the attention or the ffn block of the layer still exists.
    :param layers: the S teacher layers, of which there are `num_teacher_layers`, for "same-index".
    :raises SettingsError: for an unknown `how` or one without its arguments.
    """
    if how == "same-index" and layers and max(layers) < num_teacher_layers:
        return _match_same_index(alive, [_rounded((layer + 1) * len(alive), num_teacher_layers) for layer in layers])
    if how == "nearest" and losses is not None:
        return losses.masked_fill(~alive, math.inf).argmin(1), alive.any().expand(len(losses))
    if how == "ordered" and losses is not None:
        return _match_ordered(losses, alive)
    raise SettingsError(f"cannot match layers by {how!r} with these arguments; ways: {', '.join(get_args(LayerMatch))}")


def _match_same_index(alive: Tensor, depths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Match the layers at these depths, counted from 1."""
    position = torch.arange(len(alive), device=alive.device)
    passing = torch.cummax(torch.where(alive, position, -1), 0).values
    indices = torch.stack([passing[max(depth, 1) - 1] for depth in depths])
    return indices.clamp(min=0), indices >= 0


def _match_ordered(losses: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    position = torch.arange(len(alive), device=alive.device)
    below = torch.full_like(position[0], len(alive))
    indices: list[Tensor] = []
    valid: list[Tensor] = []
    for row in reversed(losses.unbind()):
        candidates = alive & (position < below)
        indices.append(row.masked_fill(~candidates, math.inf).argmin())
        valid.append(candidates.any())
        below = torch.where(valid[-1], indices[-1], below)
    return torch.stack(indices[::-1]), torch.stack(valid[::-1])


def layerwise_loss(
    student_states: Sequence[Tensor],
    teacher_states: Mapping[int, Tensor],
    projection: nn.Linear,
    *,
    how: LayerMatch,
    teacher_depth: int,
    mask: Tensor | None = None,
    alive: Tensor | None = None,
    agree: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the errors of the student layers matched to the chosen teacher layers, a sum; 0 if none is matched.

    With "same-index" and only the teacher's last layer, it is the error of the final token states.

    :param student_states: Ls of [B, T, Hs], `hidden_states[1:]` of transformers.
    :param teacher_states: by layer, S of [B, T, Ht]; no gradient flows into them. See `teacher_layers`.
    :param projection: see `hidden_projection`.
    :param mask: [B, T], not 0 at real tokens; None for all.
    :param alive: [Ls] bool, see `match_layers`; None for all. Of another length where states are those of several
        layers; then any one counts for all.
    :param teacher_depth: Lt, the teacher's number of layers.
    :param agree: takes the errors [S, Ls] by which layers are matched, returns those of all processes.
    """
    chosen = sorted(teacher_states)
    targets = torch.stack([teacher_states[layer] for layer in chosen])
    students = torch.stack(tuple(student_states))
    if alive is None:
        alive = torch.ones(len(students), dtype=torch.bool, device=students.device)
    if len(alive) != len(students):  # states that are each the output of several layers: none is known to be idle
        alive = alive.any().expand(len(students))
    losses = None if how == "same-index" else layer_losses(students, targets, projection, mask)
    if losses is not None and agree is not None:
        losses = agree(losses)
    indices, valid = match_layers(losses, alive, how, layers=chosen, num_teacher_layers=teacher_depth)
    matched = _project(students.index_select(0, indices), projection.weight, projection.bias)
    return _state_errors(matched, targets, mask).masked_fill(~valid, 0.0).sum()

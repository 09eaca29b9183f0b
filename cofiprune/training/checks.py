"""What can be known to be wrong before a run starts, said before anything is changed."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from cofiprune.errors import MaskError, TeacherError, TrainingError
from cofiprune.masking import masks_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_no_masks(model: nn.Module) -> None:
    """Make sure that no masks are attached, because a run attaches its own.

    :raises MaskError: when there are.
    """
    if masks_of(model) is not None:
        raise MaskError(
            "masks are attached to this model already: call cofiprune.compact(model) and prune the result, "
            "cofiprune.finetune(model, ...) to train what is left, or masks.detach() to start from all of it"
        )


def check_weights(model: nn.Module, who: str = "the model") -> None:
    """Make sure that all weights are numbers.

    :raises TrainingError: naming the first parameter with a value that is not.
    """
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter.detach()).all()):
            raise TrainingError(f"{who} has values that are not numbers in {name!r}; nothing was changed")


def resolve_teacher(
    teacher: PreTrainedModel | Literal["self"] | None, student: PreTrainedModel
) -> PreTrainedModel | None:
    """Return the model that teaches, frozen in evaluation mode, or None.

    :param teacher: a model of the same vocabulary and labels, "self" for a copy of the student as it is, or None.
    :raises TeacherError: when it cannot teach this student.
    """
    if teacher is None:
        return None
    if isinstance(teacher, str):
        if teacher != "self":
            raise TeacherError(f'teacher takes a model, "self" or None, not {teacher!r}; load a folder first')
        frozen = copy.deepcopy(student)
        frozen.train(False)
        return frozen
    if not isinstance(teacher, nn.Module) or not hasattr(teacher, "config"):
        raise TeacherError(f'teacher takes a transformers model, "self" or None, not {type(teacher).__name__}')
    if teacher is student:
        raise TeacherError('the teacher is the student itself; pass teacher="self" to learn from a frozen copy of it')
    for name, noun in (("vocab_size", "vocabulary"), ("num_labels", "number of labels")):
        if name == "num_labels" and student.base_model is student:
            continue
        ours, theirs = getattr(student.config, name, None), getattr(teacher.config, name, None)
        if ours != theirs:
            raise TeacherError(f"the teacher has another {noun} than the student: {theirs} and {ours}")
    check_weights(teacher, "the teacher")
    teacher.train(False)
    return teacher

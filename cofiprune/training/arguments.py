"""Arguments of a run, checked against its model before anything is changed: weights, what is learned from, target."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from cofiprune import accounting
from cofiprune.compaction.uniform_config import config_names
from cofiprune.data.batches import Batches, RowBatches
from cofiprune.data.checks import check, longest_sequence
from cofiprune.data.synthetic import synthetic_inputs
from cofiprune.data.tasks import class_names, supported_kwargs, task_of
from cofiprune.errors import DataError, SettingsError, TeacherError, TrainingError
from cofiprune.latency.measuring import conditions_of
from cofiprune.latency.target import best_multiple, latency_target
from cofiprune.masking import masks_of
from cofiprune.measure.benchmark import seen_length
from cofiprune.parts import encoder_config
from cofiprune.selection.target import FILE, Target
from cofiprune.structure import Structure
from cofiprune.training.config import PruneConfig
from cofiprune.training.resolved import ResolvedSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_IN_TIME = ("target_speedup", "target_latency_ms")
_ROUND = 8
"""Sizes that matrix kernels like, where the target is a time: others take longer than the next one. Tensor cores of
NVIDIA's GPUs take 16-bit matrices in pieces of 8. On an AMD EPYC in float32, a feed-forward block of 135 dimensions
takes 1.06 times (128 positions) to 1.26 times (4096) as long as one of 136."""
_KINDS = {"multi-label": "classification", "regression": "classification"}
"""Tasks that one class of models serves, depending on its configuration and its labels."""


def take_masks_off(model: nn.Module, *, quietly: bool = False, stacklevel: int = 4) -> None:
    """Detach the masks that an earlier run left on a model.

    :param quietly: do not say so, because they are those of the run that is resumed.
    """
    masks = masks_of(model)
    if masks is None:
        return
    masks.detach()
    if not quietly:
        warnings.warn(
            "the masks that were attached to this model are taken off, and pruning starts from all of it. To go on "
            "from what they keep, prune cofiprune.compact(model); to train it, call cofiprune.finetune(model, ...)",
            UserWarning,
            stacklevel=stacklevel,
        )


def check_weights(
    model: nn.Module, who: str = "the model", *, error: type[TrainingError | TeacherError] = TrainingError
) -> None:
    """Make sure that all weights are there, are numbers, and could learn.

    :raises TrainingError: or `error`, naming the first parameter that is not.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise error(
                f"{who} has no values in {name!r}, which is on the meta device; load its weights with from_pretrained"
            )
        if parameter.is_inference():
            raise error(
                f"{who} was made under torch.inference_mode() ({name!r} was), and cannot learn; load it outside of that"
            )
        if not bool(torch.isfinite(parameter.detach()).all()):
            raise error(f"{who} has values that are not finite numbers in {name!r}")


def check_trainable(model: nn.Module, *, gated: bool) -> None:
    """Make sure that something can be trained.

    :param gated: gates learn too, so that the weights need not.
    :raises TrainingError: when all weights are frozen, one is trained in float16, or gates could not learn.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained and not gated:
        raise TrainingError(
            "every parameter of the model is frozen (requires_grad is False): there is nothing to train"
        )
    if gated and any(_is_reentrant(module) for module in model.modules()):
        raise TrainingError(
            "gates cannot learn through gradient checkpointing with use_reentrant=True, which runs backward through "
            'them once per layer; switch it on with {"use_reentrant": False}, the default of transformers'
        )
    half = next((name for name, parameter in trained.items() if parameter.dtype == torch.float16), None)
    if half is not None:
        raise TrainingError(
            f"{half!r} is float16, in which Adam's steps overflow; call model.float() and pass mixed_precision='fp16' "
            "on a GPU, or load the model with dtype=torch.bfloat16"
        )


def _is_reentrant(module: nn.Module) -> bool:
    function = getattr(module, "_gradient_checkpointing_func", None)
    keywords = getattr(function, "keywords", None) or {}
    return bool(getattr(module, "gradient_checkpointing", False) and keywords.get("use_reentrant"))


def check_learnable(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: Batches,
    settings: ResolvedSettings,
) -> None:
    """Make sure that the settings leave something to learn from, all through the run.

    :raises SettingsError: when every part of the loss has the weight 0.
    :raises DataError: when labels are asked for and not there.
    :raises TeacherError: when the teacher has nothing to say to the student's head or cannot read the data.
    """
    labels, logits, layers = settings.label_weight, settings.distill_logits_weight, settings.distill_layers_weight
    if labels and not batches.labelled:
        raise DataError(f"label_weight={labels:g} asks for labels, and train_dataset has none")
    if teacher is None and not batches.taught:
        if not labels:
            raise SettingsError("label_weight=0 without a teacher leaves nothing to learn from; pass a teacher")
        return
    models = [student] if teacher is None else [student, teacher]
    mute = [each for each in models if not supported_kwargs(each, output_hidden_states=True)]
    if layers and mute:
        raise SettingsError(
            f"{type(mute[0]).__name__}.forward takes no output_hidden_states, so that the states of its layers cannot "
            "be distilled: add it, as the models of transformers have it, or set distill_layers_weight=0"
        )
    if batches.partly and not (logits or layers):
        raise SettingsError(
            "unlabelled_dataset: nothing is learned of it, as distill_logits_weight and distill_layers_weight are 0"
        )
    if not (labels or logits or layers):
        raise SettingsError(
            "nothing to learn from: label_weight, distill_logits_weight and distill_layers_weight are 0"
            if batches.labelled
            else "nothing to learn from: no labels, and distill_logits_weight and distill_layers_weight are 0"
        )
    if teacher is None:
        return
    if not labels and batches.task != "embedding" and task_of(teacher) == "embedding":
        raise TeacherError(
            f"the teacher, a {type(teacher).__name__}, has no head that could teach the head of a "
            f"{type(student).__name__}, and no labels are learned from"
        )
    if isinstance(batches, RowBatches) and batches.in_memory:
        try:
            check(batches.rows, teacher, "other")
        except DataError as error:
            raise TeacherError(f"the teacher cannot read train_dataset: {error}") from None


def resolve_teacher(
    teacher: PreTrainedModel | Literal["self"] | None, student: PreTrainedModel, *, of_dense: bool = False
) -> PreTrainedModel | None:
    """Return the model that teaches, or None.

    :param teacher: a model of the same vocabulary and labels, "self" for a copy of the student as it is, or None.
    :param of_dense: the copy has no masks, whatever an earlier run left on the student.
    :raises TeacherError: when it cannot teach this student.
    """
    if teacher is None:
        return None
    if isinstance(teacher, str):
        if teacher != "self":
            raise TeacherError(f'teacher takes a model, "self" or None, not {teacher!r}; load a folder first')
        copied = copy.deepcopy(student)
        masks = masks_of(copied) if of_dense else None
        if masks is not None:
            masks.detach()
        return copied
    if not isinstance(teacher, nn.Module) or not hasattr(teacher, "config"):
        raise TeacherError(f'teacher takes a transformers model, "self" or None, not {type(teacher).__name__}')
    if teacher is student:
        raise TeacherError('the teacher is the student itself; pass teacher="self" to learn from a frozen copy of it')
    ours = {id(parameter) for parameter in student.parameters()}
    shared = next((name for name, parameter in teacher.named_parameters() if id(parameter) in ours), None)
    if shared is not None:
        raise TeacherError(f"the teacher shares {shared!r} with the student, and would change with it; copy it first")
    for name, noun in (("vocab_size", "vocabulary"), ("num_labels", "number of labels")):
        configs = [encoder_config(each) if name == "vocab_size" else each.config for each in (student, teacher)]
        if name == "num_labels" and task_of(student) == "embedding":
            continue
        own, other = (getattr(each, name, None) for each in configs)
        if own != other:
            raise TeacherError(f"the teacher has another {noun} than the student: {other} and {own}")
    tasks = [_KINDS.get(task_of(model), task_of(model)) for model in (student, teacher)]
    if "embedding" not in tasks and tasks[0] != tasks[1]:
        raise TeacherError(
            f"the teacher, a {type(teacher).__name__}, predicts something else than the student, a "
            f"{type(student).__name__}"
        )
    check_weights(teacher, "the teacher", error=TeacherError)
    _compare_classes(student, teacher)
    return teacher


def _compare_classes(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Say how the classes of a teacher are matched with those of its student, where their names are not the same.

    :raises TeacherError: when some names are the same and stand for other classes.
    """
    ours, theirs = class_names(student), class_names(teacher)
    if ours == theirs or not (ours and theirs):
        return
    both = f"the teacher's are {_listed(theirs)}, the student's {_listed(ours)}"
    if set(ours) == set(theirs):
        if task_of(student) == "other":  # whose outputs may have their classes anywhere
            raise TeacherError(f"teacher and student have the same classes in another order: {both}")
        warnings.warn(
            f"the classes are in another order, and are matched by their names: {both}", UserWarning, stacklevel=4
        )
        return
    advice = "If they mean the same in this order, give both models one config.id2label and config.label2id"
    moved = next((name for name in ours if name in theirs and theirs.index(name) != ours.index(name)), None)
    if moved is not None:
        raise TeacherError(f"the classes are not the same, and {moved!r} is at another place: {both}. {advice}.")
    warnings.warn(
        f"the classes have other names, and are matched by their order: {both}. {advice}", UserWarning, stacklevel=4
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} others" if names[4:] else "")


def target_for(model: PreTrainedModel, structure: Structure, config: PruneConfig, name: str, value: float) -> Target:
    """Make the target that a run was asked for; a target in time is measured, which can take minutes.

    :param name: of the argument; see `parse_target`.
    :raises TargetError: for a value that means nothing to remove.
    :raises PlanError: for `uniform` where the model's configuration cannot say such a shape.
    """
    length = counted_length(model, config)
    if name in _IN_TIME:
        conditions = conditions_of(
            model,
            structure,
            batch_size=config.target_batch_size,
            seq_len=length,
            cut_hidden=any(group.kind == "hidden" for group in structure.select(config.units)),
            engine=config.engine,
        )
        target = latency_target(model, structure, name, value, conditions, cache=config.latency_cache)
    elif name == "target_macs":
        target = _macs(model, structure, length, value)
    elif name == FILE:
        target = _file(model, structure, config.target_file_dtype, value)
    else:
        cost = accounting.layer_parameters if name == "target_sparsity" else accounting.model_parameters
        target = Target.create(name, value, cost, cost(structure).exact(structure.sizes))
    multiple = config.round_to
    if multiple == "auto":
        multiple = best_multiple(model, structure, rows=config.target_batch_size * length)
    elif multiple is None:
        multiple = _ROUND if name in _IN_TIME else 1
    target = replace(target, round_to=multiple)
    if not config.uniform:
        return target
    return replace(target, uniform=True, tied_heads=config_names(model, structure).head_dim is None)


def _file(model: PreTrainedModel, structure: Structure, dtype: str, value: float) -> Target:
    """Make the target of a file, with what `save_pretrained` writes; in another precision where it is named."""
    own = dtype == "model"
    sizes = {
        name: (each.dtype if own else getattr(torch, dtype)).itemsize
        for name, each in model.named_parameters(remove_duplicate=False)
    }
    known = set(sizes)
    buffers = sum(each.nbytes for name, each in model.state_dict().items() if name not in known)
    cost = partial(accounting.file_bytes, sizes=sizes, fixed=buffers)
    setting = f"in {str(model.dtype).removeprefix('torch.') if own else dtype}"
    return Target.create(FILE, value, cost, cost(structure).exact(structure.sizes), setting=setting)


def counted_length(model: PreTrainedModel, config: PruneConfig) -> int:
    """Return the length at which operations are counted and time is measured: as long as the model reads, at most."""
    longest = longest_sequence(model)
    return config.target_seq_len if longest is None else min(config.target_seq_len, longest)


def _macs(model: PreTrainedModel, structure: Structure, length: int, value: float) -> Target:
    inputs = synthetic_inputs(model, batch_size=1, seq_len=length)
    seq_len = seen_length(model, structure, inputs, length)
    setting = f"at {seq_len} tokens"
    cost = partial(accounting.model_macs, seq_len=seq_len)
    return Target.create("target_macs", value, cost, cost(structure).exact(structure.sizes), setting=setting)

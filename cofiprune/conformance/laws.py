"""The laws of the masks, one function each; a law that does not hold raises a `LawError` naming what is at fault."""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.utils import logging

from cofiprune import accounting
from cofiprune.adapter import structure as structure_of
from cofiprune.conformance import exits, fault
from cofiprune.conformance.absent import loaded_without
from cofiprune.conformance.calls import calls_of, compared, largest, size
from cofiprune.conformance.specimens import Choice, Subject, Values, outputs, tensors
from cofiprune.errors import LawError
from cofiprune.masks import MaskRegistry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUNDED = 1e-5
"""Largest difference allowed to a model whose own modules round to float32, relative to its outputs."""


@dataclass(frozen=True)
class Case:
    """One set of masks to try."""

    label: str
    choice: Choice
    """The kinds of units that are masked."""
    values: Values
    """Groups that are not named keep ones."""
    reload: bool = False
    """True where saving and loading the compacted model is worth its time."""

    def __str__(self) -> str:
        return f"{self.label} over units {', '.join(self.choice)}"


def check_structure(subject: Subject) -> None:
    """Every parameter of a block goes with it, and attributes hold the sizes of the groups that they follow.

    :raises LawError: with the first parameter or attribute for which this is wrong.
    """
    structure = subject.structure
    exits.check_covered(structure)
    for attribute in structure.attributes:
        group = structure[attribute.group]
        wanted = group.size * attribute.per_unit
        value = getattr(subject.model.get_submodule(attribute.module), attribute.name, None)
        counts = attribute.per_unit == 1 or value in (None, group.size)
        if value != wanted and counts:  # the number of elements per unit is checked by the laws of the masks
            readers = [spec for spec in structure.parameters if spec.gated and fault.role_of(spec, group.name)]
            raise LawError(
                f"{attribute.name!r} of {attribute.module!r} is {value}, and should be {wanted}: {group.name} has "
                f"{group.size} units, and {attribute.per_unit} is counted for each. Check the attribute's name and its "
                "axis (HEADS.of(1) counts heads, HEADS their elements), sizes, and the projection that says how many "
                f"elements a unit has: {fault.described(readers)}."
            )


def check_applications(subject: Subject) -> None:
    """Every layer runs as often as the description says; counts of operations follow this, and no other law does.

    :raises LawError: naming the first layer that does not.
    """
    layers = subject.structure.layers
    runs = Counter(call.path for call in calls_of(subject.model, subject.batch, layers))
    for path, times in zip(layers, subject.structure.applications or (1,) * len(layers), strict=True):
        if runs[path] != times:
            raise LawError(
                f"layer {path!r} runs {runs[path]} times in a forward pass, and `applications` says "
                f"{times}. It is ({', '.join(str(runs[each]) for each in layers)}) for these layers."
            )


def check_ones(subject: Subject) -> float:
    """Masks of ones change nothing, names stay as they are, and detaching restores the model bit for bit.

    :return: the difference that differentiable masks of ones make. They compute norms in the model's dtype, so
        that more than 1e-10 shows that the model itself rounds to float32.
    :raises LawError: when one of this does not hold.
    """
    model = subject.model
    stock = subject.outputs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    with subject.masked() as masks:
        if largest(stock, exits.run(subject, "masks of ones")) != 0:
            raise LawError(f"masks of ones change the outputs. {fault.first_change(subject)}")
        if list(model.state_dict()) != list(before) or [name for name, _ in model.named_parameters()] != names:
            raise LawError("attached masks change the names of parameters or of the state dict")
        masks.bind({name: value.clone() for name, value in masks.items()})
        rounding = largest(stock, exits.run(subject, "differentiable masks of ones"))
        if not rounding <= ROUNDED * size(stock):
            which = fault.first_change(subject, limit=ROUNDED)
            raise LawError(f"differentiable masks of ones change the outputs by {rounding:.2g}. {which}")
    after = model.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    if changed or largest(stock, subject.outputs()) != 0:
        raise LawError(f"detaching does not restore {', '.join(changed) or 'the outputs'}")
    return rounding


def check_case(subject: Subject, case: Case, tolerance: float, *, reload: bool = False) -> float:
    """The masked model is the compacted one, counts are exact, and set, differentiable and saved forms agree.

    :param tolerance: relative to the size of the outputs.
    :param reload: save and load the compacted model too.
    :return: the largest difference between the masked and the compacted model.
    :raises LawError: naming the parameter at fault.
    """
    with subject.masked(case.choice, case.values) as masks:
        plan = masks.plan()
        masked = exits.run(subject, str(case))
        limit = tolerance * size(masked)
        small = subject.compacted(plan)
        if problem := _wrong_counts(subject, masks, small):
            raise LawError(f"counts are not those of the compacted model ({case}). {problem}")
        try:
            cut = outputs(small, subject.batch)
            difference = compared(masked, cut, plan)
        except Exception:  # the search below runs the model again and says where it fails
            difference = float("inf")
        if difference > limit:
            masks.detach()
            found = fault.locate(subject, case.values, case.choice, limit)
            raise LawError(f"masked and compacted model differ by {difference:.2g} ({case}). {found}")
        masks.bind({name: value.clone() for name, value in masks.items()})
        bound = compared(exits.run(subject, f"differentiable {case}"), cut, plan)
        if bound > limit:
            raise LawError(f"differentiable and set masks differ by {bound:.2g} ({case})")
    if reload:
        _check_reload(subject, small, cut, case, limit)
    return difference


def check_cut(subject: Subject, case: Case) -> None:
    """The structure of a compacted model is the one that is cut from the structure of the model.

    :raises LawError: naming what differs.
    """
    with subject.masked(case.choice, case.values) as masks:
        plan = masks.plan()
    if plan.kept == subject.structure.sizes:
        return  # nothing was cut, and nothing is recorded
    resolved, cut = structure_of(subject.compacted(plan)), subject.structure.cut(plan.kept)
    for name in ("groups", "parameters", "norms", "blocks", "attributes"):
        differs = {str(each) for each in getattr(resolved, name)} ^ {str(each) for each in getattr(cut, name)}
        if differs:
            found = f"the compacted model has other {name} than its structure says ({case})"
            raise LawError(f"{found}: {min(differs)}")


def _wrong_counts(subject: Subject, masks: MaskRegistry, small: PreTrainedModel) -> str:
    """Say which counts differ from those of a compacted model's tensors; "" when none do."""
    kept = masks.plan().kept
    if problem := fault.wrong_shapes(subject.structure, small, kept):
        return problem
    layers = tuple(f"{path}." for path in subject.structure.layers)
    total, left = (
        sum(value.numel() for name, value in model.named_parameters() if name.startswith(layers))
        for model in (subject.model, small)
    )
    counted = accounting.layer_parameters(subject.structure).exact(kept)
    if counted != left or masks.sparsity() != 1 - left / total:
        return f"The layers have {counted} parameters by count and {left} in the compacted model."
    return ""


def _check_reload(
    subject: Subject, small: PreTrainedModel, cut: Mapping[str, Tensor], case: Case, limit: float
) -> None:
    """A compacted model has the same weights and outputs after saving and loading, with cofiprune and without.

    :param cut: its outputs. Matrix products may round otherwise where weights lie elsewhere in memory.
    :raises LawError: naming a weight that differs.
    """
    for door, load in (("", _reloaded), (" by its modelling file", loaded_without)):
        try:
            again = load(small)
        except Exception as error:  # the dense model could be loaded
            why = f"{error}. {fault.tied_alone(subject, str(error))}"
            raise LawError(f"the compacted model does not load from its file{door} ({case}). {why}") from error
        if again is not None:
            again.train(False)
            _check_again(subject, (small, again), cut, f"{door} ({case})", limit)


def _check_again(
    subject: Subject, models: tuple[PreTrainedModel, ...], cut: Mapping[str, Tensor], where: str, limit: float
) -> None:
    """Compare two models, one that was saved and what was loaded."""
    small, again = models
    loaded = {**again.state_dict(), **dict(again.named_buffers())}
    stored = {**small.state_dict(), **dict(small.named_buffers())}
    # A buffer that is in no file, such as the frequencies of rotary positions, may come back in another dtype too.
    if any(name in loaded and value.dtype != loaded[name].dtype for name, value in stored.items()):
        limit = max(limit, ROUNDED * size(cut))
    changed = _changed_weights(small, again)
    difference = largest(cut, outputs(again, subject.batch))
    if changed or difference > limit:
        named = ", ".join(changed[:4]) or f"the outputs by {difference:.2g}"
        raise LawError(f"saving and loading the compacted model changes {named}{where}")


def unsaved(model: PreTrainedModel) -> str:
    """Say why transformers cannot save and load the model as it is, which is not the adapter's fault; "" if it can."""
    try:
        changed = _changed_weights(model, _reloaded(model))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return f"transformers changes {', '.join(changed[:4])} of the model as it is" if changed else ""


def _reloaded(model: PreTrainedModel) -> PreTrainedModel:
    """A model as it comes back from a file, in float64 and evaluation mode."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    try:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, portable=False)
            again: PreTrainedModel = type(model).from_pretrained(folder, dtype=torch.float64)
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    again.train(False)
    return again


def _changed_weights(model: PreTrainedModel, again: PreTrainedModel) -> list[str]:
    """Name the weights of a model that a file changed or lost.

    transformers loads some (DeBERTa's q_bias) in float32 whatever dtype was asked for: they are compared in that.
    """
    loaded = again.state_dict()
    return [
        name
        for name, value in model.state_dict().items()
        if name not in loaded or not torch.equal(value.to(loaded[name].dtype), loaded[name])
    ]


def check_gradients(subject: Subject, generator: torch.Generator) -> None:
    """The gradient reaches the differentiable masks of every group and is finite.

    :raises LawError: naming the group that it does not reach and the parameters that its mask scales.
    """
    structure = subject.structure
    found = _gradients(subject, generator)
    if not all(gradient is None or bool(torch.isfinite(gradient).all()) for gradient in found.values()):
        # Some models mask by the smallest number of float64, and round it to float32 then.
        narrow = {name: row.float() if row.is_floating_point() else row for name, row in subject.batch.items()}
        model = copy.deepcopy(subject.model)
        nn.Module.to(model, torch.float32)
        found = _gradients(Subject(model, narrow, structure), generator)
    for name, gradient in found.items():
        if gradient is None or not bool(torch.isfinite(gradient).all()) or not bool(gradient.any()):
            state = "missing" if gradient is None else f"{gradient.tolist()}"
            scaled = fault.scaled_by(structure, name)
            raise LawError(f"the gradient of mask {name!r} is {state}. {scaled}")


def _gradients(subject: Subject, generator: torch.Generator) -> dict[str, Tensor | None]:
    """The gradient of a random sum of the outputs in every group's masks."""
    dtype = next(subject.model.parameters()).dtype
    values = {
        group.name: (torch.rand(group.size, generator=generator, dtype=dtype) * 0.6 + 0.3).requires_grad_()
        for group in subject.structure.groups
    }
    with subject.masked() as masks, torch.enable_grad():
        masks.bind(values)
        found = [value for value in tensors(subject.model(**subject.batch)).values() if value.requires_grad]
        weights = [torch.randn(value.shape, generator=generator, dtype=value.dtype) for value in found]
        return dict(
            zip(values, torch.autograd.grad(found, list(values.values()), weights, allow_unused=True), strict=True)
        )

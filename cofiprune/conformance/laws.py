"""The laws of the masks, one function each; a law that does not hold raises a `LawError` naming what is at fault."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.utils import logging

from cofiprune import accounting
from cofiprune.compaction import compact
from cofiprune.conformance import exits, fault
from cofiprune.conformance.specimens import Batch, outputs, tensors
from cofiprune.conformance.trace import crash_site, gap
from cofiprune.errors import LawError
from cofiprune.masking import attach
from cofiprune.masks import MaskRegistry
from cofiprune.plan import Plan
from cofiprune.structure import Structure, UnitKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Values = Mapping[str, Tensor]
Choice = tuple[UnitKind, ...]

ROUNDED = 1e-5
"""Largest difference allowed to a model whose own modules round to float32, relative to its outputs."""


@dataclass(frozen=True)
class Subject:
    """A model under test (float64, evaluation mode), its inputs and its structure."""

    model: PreTrainedModel
    batch: Batch
    structure: Structure

    @property
    def who(self) -> str:
        return f"{type(self.model).__name__} ({self.structure.family})"


@dataclass(frozen=True)
class Case:
    """One set of masks to try."""

    label: str
    choice: Choice
    """The kinds of units that are masked."""
    values: Values
    """Masks by group name, [units] each; groups that are not named keep ones."""
    reload: bool = False
    """Whether to send the compacted model through a file too."""

    def __str__(self) -> str:
        return f"{self.label} over units {', '.join(self.choice)}"


def check_ones(subject: Subject) -> float:
    """Masks of ones change nothing, names stay as they are, and detaching restores the model bit for bit.

    :return: the difference that differentiable masks of ones make. They compute norms in the model's dtype, so
        that more than 1e-10 shows that the model itself rounds to float32.
    :raises LawError: when one of this does not hold.
    """
    model, batch = subject.model, subject.batch
    stock = outputs(model, batch)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    with attach(model) as masks:
        if largest(stock, run(subject, "masks of ones")) != 0:
            which = fault.first_change(model, batch, subject.structure)
            raise LawError(f"{subject.who}: masks of ones change the outputs. {which}")
        if list(model.state_dict()) != list(before) or [name for name, _ in model.named_parameters()] != names:
            raise LawError(f"{subject.who}: attached masks change the names of parameters or of the state dict")
        masks.bind({name: value.clone() for name, value in masks.items()})
        rounding = largest(stock, run(subject, "differentiable masks of ones"))
        if not rounding <= ROUNDED * size(stock):
            which = fault.first_change(model, batch, subject.structure, limit=ROUNDED)
            raise LawError(f"{subject.who}: differentiable masks of ones change the outputs by {rounding:.2g}. {which}")
    after = model.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    if changed or largest(stock, outputs(model, batch)) != 0:
        raise LawError(f"{subject.who}: detaching does not restore {', '.join(changed) or 'the outputs'}")
    return rounding


def check_blocks(subject: Subject) -> None:
    """A layer without its blocks returns its input, and a block's gate scales all of its output, bias included.

    Masked and compacted models agree on a wrong `Exit` and on a bias that no gate scales, hence a law apart.

    :raises LawError: naming the `Exit` or the parameter.
    """
    structure = subject.structure
    with attach(subject.model, "layer") as masks:
        for name in masks:
            masks[name] = [exits.SHUT]
        problem = exits.ungated(subject.model, structure, subject.batch)
        if problem:
            raise LawError(f"{subject.who}: a block's gate must scale all of its output. {problem}")
        for name in masks:
            masks[name] = [0]
        problem = exits.wrong_exit(subject.model, structure, subject.batch)
        if problem:
            raise LawError(f"{subject.who}: a removed block must hand its input on. {problem}")
        for kind in ("attention", "ffn"):
            problem = exits.overreaching(subject.model, structure, subject.batch, kind)
            if problem:
                raise LawError(f"{subject.who}: a block that is left must work as before. {problem}")


def check_case(subject: Subject, case: Case, tolerance: float) -> float:
    """The masked model is the compacted one, counts are exact, and set, differentiable and saved forms agree.

    :param tolerance: relative to the size of the outputs.
    :return: the largest difference between the masked and the compacted model.
    :raises LawError: naming the parameter at fault.
    """
    model, structure = subject.model, subject.structure
    with attach(model, case.choice) as masks:
        for name, value in case.values.items():
            masks[name] = value
        plan = masks.plan()
        masked = run(subject, str(case))
        limit = tolerance * size(masked)
        small = compact(model)
        problem = wrong_counts(subject, masks, plan, small)
        if problem:
            raise LawError(f"{subject.who}: counts are not those of the compacted model ({case}). {problem}")
        try:
            cut = outputs(small, subject.batch)
            difference = compared(masked, cut, plan)
        except Exception:  # of whatever kind: the search below runs it again and says where
            difference = float("inf")
        if difference > limit:
            masks.detach()
            found = fault.locate(model, subject.batch, structure, case.values, case.choice, limit)
            raise LawError(f"{subject.who}: masked and compacted model differ by {difference:.2g} ({case}). {found}")
        masks.bind({name: value.clone() for name, value in masks.items()})
        bound = compared(run(subject, f"differentiable {case}"), cut, plan)
        if bound > limit:
            raise LawError(f"{subject.who}: differentiable and set masks differ by {bound:.2g} ({case})")
    if case.reload:
        check_reload(subject, small, cut, case, limit)
    return difference


def check_reload(subject: Subject, small: PreTrainedModel, cut: Mapping[str, Tensor], case: Case, limit: float) -> None:
    """A compacted model has the same weights after saving and loading, and the same outputs.

    :param cut: its outputs. Matrix products may round otherwise where weights lie elsewhere in memory.
    :raises LawError: naming a weight that differs.
    """
    try:
        again = reloaded(small)
    except Exception as error:  # of whatever kind: before it was compacted, the model could be loaded
        why = f"{error}. {fault.tied_alone(subject.model, subject.structure, str(error))}"
        raise LawError(f"{subject.who}: the compacted model does not load from its file ({case}). {why}") from error
    stored, loaded = small.state_dict(), again.state_dict()
    changed = changed_weights(small, again)
    retyped = any(value.dtype != loaded[name].dtype for name, value in stored.items() if name in loaded)
    if retyped or _others(small, again):
        limit = max(limit, ROUNDED * size(cut))
    difference = largest(cut, outputs(again, subject.batch))
    if changed or difference > limit:
        named = ", ".join(changed[:4]) or f"the outputs by {difference:.2g}"
        raise LawError(f"{subject.who}: saving and loading the compacted model changes {named} ({case})")


def reloaded(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model as it comes back from a file, in float64 and evaluation mode."""
    with tempfile.TemporaryDirectory() as folder, _quiet():
        model.save_pretrained(folder)
        again: PreTrainedModel = type(model).from_pretrained(folder, dtype=torch.float64)
    again.train(False)
    return again


def changed_weights(model: PreTrainedModel, again: PreTrainedModel) -> list[str]:
    """Names of the weights of a model that came back from a file changed, or not at all."""
    loaded = again.state_dict()
    stored = model.state_dict().items()
    return [name for name, value in stored if name not in loaded or not _same(value, loaded[name])]


def _others(model: PreTrainedModel, again: PreTrainedModel) -> bool:
    """Whether a buffer that is in no file, such as the frequencies of rotary positions, came back in another dtype."""
    loaded = dict(again.named_buffers())
    return any(name in loaded and value.dtype != loaded[name].dtype for name, value in model.named_buffers())


def _same(stored: Tensor, loaded: Tensor) -> bool:
    """Whether a tensor came back; transformers loads some (DeBERTa's q_bias) in float32 whatever was asked for."""
    return torch.equal(stored.to(loaded.dtype), loaded)


def check_gradients(subject: Subject, generator: torch.Generator) -> None:
    """The gradient reaches the differentiable masks of every group and is finite.

    :raises LawError: naming the group that it does not reach and the parameters that its mask scales.
    """
    structure = subject.structure
    values = {
        group.name: (torch.rand(group.size, generator=generator, dtype=torch.float64) * 0.6 + 0.3).requires_grad_()
        for group in structure.groups
    }
    with attach(subject.model) as masks, torch.enable_grad():
        masks.bind(values)
        found = [value for value in tensors(subject.model(**subject.batch)).values() if value.requires_grad]
        weights = [torch.randn(value.shape, generator=generator, dtype=value.dtype) for value in found]
        gradients = torch.autograd.grad(found, list(values.values()), weights, allow_unused=True)
    for name, gradient in zip(values, gradients, strict=True):
        if gradient is None or not bool(torch.isfinite(gradient).all()) or not bool(gradient.any()):
            state = "missing" if gradient is None else f"{gradient.tolist()}"
            scaled = fault.scaled_by(structure, name)
            raise LawError(f"{subject.who}: the gradient of mask {name!r} is {state}. {scaled}")


def wrong_counts(subject: Subject, masks: MaskRegistry, plan: Plan, small: PreTrainedModel) -> str:
    """Say which counts differ from those of a compacted model's tensors; "" when none do."""
    structure = subject.structure
    problem = fault.wrong_shapes(structure, small, plan)
    layers = tuple(f"{path}." for path in structure.layers)
    total, left = (
        sum(value.numel() for name, value in model.named_parameters() if name.startswith(layers))
        for model in (subject.model, small)
    )
    counted = accounting.layer_parameters(structure).exact(plan.kept)
    if not problem and (counted != left or masks.sparsity() != 1 - left / total):
        problem = f"The layers have {counted} parameters by count and {left} in the compacted model."
    return problem


def compared(full: Mapping[str, Tensor], small: Mapping[str, Tensor], plan: Plan) -> float:
    """Return the largest difference between outputs of a masked and of a compacted model.

    Where the encoder's states come out, only the kept hidden dimensions have a counterpart, and what the masked
    model has in the removed ones counts as a difference.
    """
    difference = 0.0
    for name, value in full.items():
        shapes = list(zip(value.shape, small[name].shape, strict=True)) if value.dim() == small[name].dim() else []
        kept = list(plan.keep.get("hidden", ()))
        # The last dimension of the states, the second of an image's feature maps.
        hidden = (plan.sizes.get("hidden"), len(kept))
        dims = [dim for dim, pair in enumerate(shapes) if pair == hidden and pair[0] != pair[1]]
        if kept and dims:
            wide = value.movedim(dims[0], -1)
            removed = sorted(set(range(wide.shape[-1])) - set(kept))
            difference = max(difference, float(wide[..., removed].abs().max()))
            value = wide[..., kept].movedim(-1, dims[0])
        difference = max(difference, largest({name: value}, small))
    return difference


def run(subject: Subject, what: str) -> dict[str, Tensor]:
    """Run a model under masks.

    :raises LawError: when it fails, naming the module.
    """
    try:
        return outputs(subject.model, subject.batch)
    except Exception as error:  # of whatever kind: it comes from inside the model
        crash = crash_site(subject.model, subject.batch)
        hint = exits.exit_hint(subject.structure, crash)
        raise LawError(f"{subject.who}: fails under {what}, in {crash}. {hint}") from error


def largest(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Largest difference; infinite when shapes differ or something is not a number."""
    if any(value.shape != right[name].shape for name, value in left.items()):
        return float("inf")
    return max(gap(value, right[name]) for name, value in left.items())


def size(found: Mapping[str, Tensor]) -> float:
    """Largest number among some outputs, at least 1."""
    return max(1.0, *(float(value.abs().max()) for value in found.values()))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars that transformers shows when it writes and reads a model."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]

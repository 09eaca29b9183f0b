"""Proving a table: the laws of the masks, run on a model with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from cofiprune.adapter import Family, TableAdapter, temporarily
from cofiprune.adapter import structure as structure_of
from cofiprune.conformance.battery import EXACT, cases
from cofiprune.conformance.description import check_applications, check_structure
from cofiprune.conformance.laws import (
    ROUNDED,
    Case,
    Subject,
    changed_weights,
    check_blocks,
    check_case,
    check_gradients,
    check_ones,
    reloaded,
)
from cofiprune.conformance.specimens import Batch
from cofiprune.errors import CofipruneError
from cofiprune.structure import UNIT_KINDS, UnitKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def problem(
    model: PreTrainedModel, batch: Batch, family: Family, units: Sequence[UnitKind] | None, *, whole: bool = False
) -> str:
    """Return the first law that a table breaks, in the words of its error; "" when it keeps all that is tried.

    :param model: in float64 and evaluation mode, with random weights.
    :param units: one choice of unit kinds to try; None for all that the table allows, together.
    :param whole: try also blocks, gradients, and sending a compacted model through a file.
    """
    generator = torch.Generator().manual_seed(1)
    with temporarily(TableAdapter(model.config.model_type, family)):
        try:
            subject = Subject(model, batch, structure_of(model))
            check_structure(subject)
            check_applications(subject, family.applications)
            tolerance = EXACT if check_ones(subject) <= EXACT else ROUNDED
            if whole:
                check_blocks(subject)
            file = whole and not _changed(model)
            present = {group.unit for group in subject.structure.groups}
            chosen = tuple(unit for unit in UNIT_KINDS if unit in present) if units is None else tuple(units)
            for case in cases(subject.structure, generator):
                if chosen == case.choice and (whole or case.label.startswith("random")):
                    tried = case if file or not case.reload else _without_file(case)
                    check_case(subject, tried, tolerance)
            if whole:
                check_gradients(subject, generator)
        except CofipruneError as error:
            return str(error)
    return ""


def _without_file(case: Case) -> Case:
    return replace(case, reload=False)


def _changed(model: PreTrainedModel) -> bool:
    """Whether transformers itself cannot bring the model back from a file."""
    try:
        return bool(changed_weights(model, reloaded(model)))
    except Exception:  # of whatever kind
        return True

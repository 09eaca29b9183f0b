"""The adapter of a model whose family nobody has declared: derived once per class and configuration, and proved."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from cofiprune.adapter import Adapter, Axis, BlockTable, Family, TableAdapter, known_families, temporarily
from cofiprune.compaction import compact
from cofiprune.conformance.laws import compared
from cofiprune.conformance.specimens import inputs, outputs, random_values
from cofiprune.derivation.derive import Derived, derive
from cofiprune.errors import AdapterError, CofipruneError
from cofiprune.hooks import reading
from cofiprune.masking import attach

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Largest difference allowed on the model itself, relative to its outputs: what trained weights round to."""
_COARSE = 0.1
"""The same for half precision."""

_known: dict[tuple[type, str], Adapter | str] = {}


def derived_adapter(model: PreTrainedModel) -> Adapter:
    """Derive an adapter from a model, prove it on a small double and on the model itself, and keep it for others.

    :raises AdapterError: with what could not be told apart, or with the law that does not hold and where.
    """
    key = (type(model), _fingerprint(model.config))
    if key not in _known:
        try:
            with reading(model):
                derived = derive(model)
                family = for_sizes(derived, model.config)
                adapter = TableAdapter(model.config.model_type, family, stored=True)
                _prove(model, adapter)
            _known[key] = adapter
        except CofipruneError as error:
            _known[key] = str(error)
    found = _known[key]
    if isinstance(found, str):
        raise AdapterError(
            f"no adapter for model type {model.config.model_type!r} ({type(model).__name__}), and none could be "
            f"derived: {found} Families with one: {', '.join(known_families())}. To describe it yourself, see "
            "docs/how-to/add-an-adapter.md."
        )
    return found


def for_sizes(derived: Derived, config: PretrainedConfig) -> Family:
    """The table for another configuration of the same kind: with its sizes."""
    settings = derived.settings.of(config)
    heads = 1 if settings.query_heads is None else settings.query_heads // settings.units["heads"]
    family = replace(derived.family, sizes=settings.units)
    return replace(family, attention=_with_heads(family.attention, heads))


def _with_heads(table: BlockTable, heads: int) -> BlockTable:
    """The table of attention where `heads` query heads share their keys and values."""

    def counted(axis: Axis) -> Axis:
        return axis.of(heads) if axis.block is not None and axis.block > 1 else axis

    return replace(table, attributes=tuple((module, name, counted(axis)) for module, name, axis in table.attributes))


def _fingerprint(config: PretrainedConfig) -> str:
    """A digest of what of a configuration decides about a model's modules."""
    entries: dict[str, Any] = config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"):
        entries.pop(name, None)
    text = repr(sorted((str(name), repr(value)) for name, value in entries.items()))
    return hashlib.sha256(f"{text}{config._attn_implementation}".encode()).hexdigest()


def _prove(model: PreTrainedModel, adapter: Adapter) -> None:
    """Run the law on the model itself, under masks over everything: masked and compacted outputs agree.

    :raises CofipruneError: when they do not, or when the table does not fit the model.
    """
    with temporarily(adapter):
        structure = adapter.structure(model)  # every row has to fit
        weights = next(model.parameters())
        if weights.is_meta:
            return
        generator = torch.Generator().manual_seed(2)
        batch = {name: value.to(weights.device) for name, value in inputs(model, generator).items()}
        batch = {k: v.to(weights.dtype) if v.is_floating_point() else v for k, v in batch.items()}
        with attach(model) as masks:
            for group in structure.groups:
                masks[group.name] = random_values(group.size, generator, fractional=True)
            masked = outputs(model, batch)
            plan = masks.plan()
            cut = outputs(compact(model), batch)
        difference = compared(masked, cut, plan)
        size = max(float(value.abs().max()) for value in masked.values())
        if not difference <= _TOLERANCE.get(weights.dtype, _COARSE) * max(size, 1.0):
            raise AdapterError(
                f"on the model itself masked and compacted outputs differ by {difference:.2g}, although they agree on "
                "a small model of its kind."
            )

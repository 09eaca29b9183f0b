"""The contract of an adapter: it describes where units live, and the core acts.

An adapter turns a configuration into a `Family`: rows that say which side of which parameter
belongs to heads, feed-forward dimensions or the hidden size, and where a block's output leaves it.
There is no `forward` in an adapter, no tensor arithmetic and no loop over weights. `structure`
resolves the rows against a model into a `Structure`. Whoever writes an adapter finds all that it takes here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from cofiprune.errors import AdapterError
from cofiprune.family import (
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    Axis,
    BlockTable,
    ConfigSizes,
    ExtraTable,
    Family,
    Weights,
    embedding,
    expand,
    family_entries,
    family_from,
    linear,
    norm,
    projection,
    tensor,
)
from cofiprune.record import recorded_sizes, recorded_table
from cofiprune.refusals import refuse, refuse_undeclared
from cofiprune.resolving import Resolver, encoder_path
from cofiprune.structure import Structure

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "ENTRY_POINT_GROUP",
    "HEADS",
    "HIDDEN",
    "INTERMEDIATE",
    "Adapter",
    "Axis",
    "BlockTable",
    "ConfigSizes",
    "ExtraTable",
    "Family",
    "TableAdapter",
    "Weights",
    "adapter_for",
    "derive_by",
    "embedding",
    "encoder_path",
    "expand",
    "family_entries",
    "family_from",
    "known_families",
    "linear",
    "norm",
    "projection",
    "register_adapter",
    "structure",
    "temporarily",
    "tensor",
]

ENTRY_POINT_GROUP = "cofiprune.adapters"


class Adapter:
    """What a family's author implements: the model types and `describe`."""

    model_types: tuple[str, ...] = ()
    """The `config.model_type` values that it serves."""
    stored: bool = False
    """Whether a compacted model carries the table with it, because nothing that is installed has it."""
    test_settings: Mapping[str, Any] = MappingProxyType({})
    """Settings of the small configurations that `check_adapter` tries, where a model does not run with stock ones."""

    def describe(self, config: PretrainedConfig) -> Family:
        """Return the family's table for one configuration."""
        raise AdapterError(f"{type(self).__name__} has no describe(config); return a Family from it")

    def structure(self, model: PreTrainedModel, *, dense: bool = False) -> Structure:
        """Resolve the table against a model.

        :param dense: read the model as having its configuration's sizes, whatever sizes are recorded in it.
        :raises AdapterError: when a row names a module or a shape that the model does not have.
        """
        recorded = None if dense else recorded_sizes(model.config)
        family = self.describe(model.config)
        found = Resolver(model, family, recorded).structure()
        return replace(found, table=family_entries(family)) if self.stored else found


class TableAdapter(Adapter):
    """The adapter of a table that is there already: a derived one, or one that a compacted model carries."""

    def __init__(self, model_type: str, family: Family, *, stored: bool = False) -> None:
        self.model_types = (model_type,)
        self.family = family
        self.stored = stored

    def describe(self, config: PretrainedConfig) -> Family:
        return self.family


_registered: dict[str, Adapter] = {}


def register_adapter(adapter: Adapter) -> None:
    """Make an adapter known for its model types; it takes precedence over installed ones.

    :raises AdapterError: when it is not an `Adapter` instance or names no model type.
    """
    if not isinstance(adapter, Adapter):
        hint = " (pass an instance: MyAdapter(), not MyAdapter)" if isinstance(adapter, type) else ""
        raise AdapterError(f"register_adapter takes an instance of cofiprune.Adapter, not {adapter!r}{hint}")
    if isinstance(adapter.model_types, str) or not adapter.model_types:
        raise AdapterError(f"{type(adapter).__name__}.model_types must be a tuple of `config.model_type` names")
    for model_type in adapter.model_types:
        _registered[model_type] = adapter


@contextmanager
def temporarily(adapter: Adapter) -> Iterator[None]:
    """Register an adapter for the length of a `with` block."""
    before = dict(_registered)
    register_adapter(adapter)
    try:
        yield
    finally:
        _registered.clear()
        _registered.update(before)


def known_families() -> tuple[str, ...]:
    """Return the model types that have an adapter, registered or installed, sorted."""
    return tuple(sorted({*_registered, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))}))


def adapter_for(model: PreTrainedModel) -> Adapter:
    """Return the adapter of a model's family: the one registered or installed for it, or else one derived from it.

    A compacted model of a family whose adapter was derived carries the table that it was cut by.

    :raises AdapterError: when the object is not a transformers encoder as it stands (see `refusals`), or no adapter
        serves its family and none can be derived.
    """
    refuse(model)
    model_type = model.config.model_type
    table = recorded_table(model.config)
    if table is not None:
        return TableAdapter(model_type, family_from(table), stored=True)
    if model_type not in _registered:
        installed = _installed(model_type)
        if installed is None:
            refuse_undeclared(model)
            return _derive(model)
        _registered[model_type] = installed
    return _registered[model_type]


def _installed(model_type: str) -> Adapter | None:
    """Load the adapter that an installed package names for a model type; None when none does.

    :raises AdapterError: when packages name different ones, or what one names is no adapter or does not load.
    """
    # An entry point that is found twice (two folders on the path with one package's metadata) is still one adapter.
    points = {point.value: point for point in entry_points(group=ENTRY_POINT_GROUP, name=model_type)}
    if len(points) > 1:
        named = ", ".join(f"{_package(point)} ({value!r})" for value, point in points.items())
        raise AdapterError(
            f"{len(points)} packages name an adapter for model type {model_type!r}: {named}. Uninstall all but one, or "
            "choose one of them by cofiprune.register_adapter(adapter), which goes before what is installed."
        )
    for value, point in points.items():
        who = f"the adapter of model type {model_type!r} that the package {_package(point)} names, {value!r},"
        try:
            found = point.load()
        except Exception as error:  # whatever importing someone else's module raises
            raise AdapterError(f"{who} cannot be loaded: {type(error).__name__}: {error}") from error
        if not isinstance(found, Adapter):
            if isinstance(found, type) and issubclass(found, Adapter):
                what = f"it is the class {found.__name__}; the entry point has to name an instance of it"
            else:
                what = f"it is a {type(found).__name__}, not a cofiprune.Adapter"
            raise AdapterError(f"{who} cannot be used: {what}")
        return found
    return None


def _package(point: EntryPoint) -> str:
    return "of an unknown name" if point.dist is None else point.dist.name


_derivers: list[Callable[[PreTrainedModel], Adapter]] = []


def derive_by(deriver: Callable[[PreTrainedModel], Adapter]) -> None:
    """Set what makes an adapter for a model of a family without one; it lies above this module and is given to it."""
    _derivers[:] = [deriver]


def _derive(model: PreTrainedModel) -> Adapter:
    for deriver in _derivers:
        return deriver(model)
    raise AdapterError(f"no adapter for model type {model.config.model_type!r} ({type(model).__name__})")


def structure(model: PreTrainedModel) -> Structure:
    """List the prunable groups of a model: a mapping from group name to `Group`.

    :raises AdapterError: when the model's family has no adapter.
    """
    return adapter_for(model).structure(model)

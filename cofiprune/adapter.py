"""The contract of an adapter: it describes where units live, and the core acts.

An adapter turns a configuration into a `Family`: tables of the parameter sides that belong to heads, feed-forward
dimensions or the hidden size, and of the modules where blocks end. It has no `forward`, no tensor arithmetic and no
loop over weights. `structure` resolves the tables against a model. This module has every name that an adapter needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from cofiprune.errors import AdapterError, located, names_checked
from cofiprune.family import (
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    Axis,
    BlockTable,
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
from cofiprune.parts import encoder_config, encoder_within
from cofiprune.record import recorded_table, sizes_of
from cofiprune.refusals import refuse, refuse_undeclared
from cofiprune.resolving import Resolver, encoder_path
from cofiprune.structure import BlockExit, ConfigSizes, Narrow, Shared, Structure
from cofiprune.whole import inside

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "ENTRY_POINT_GROUP",
    "HEADS",
    "HIDDEN",
    "INTERMEDIATE",
    "Adapter",
    "Axis",
    "BlockExit",
    "BlockTable",
    "ConfigSizes",
    "ExtraTable",
    "Family",
    "Narrow",
    "Shared",
    "TableAdapter",
    "Weights",
    "adapter_for",
    "embedding",
    "encoder_path",
    "expand",
    "family",
    "family_entries",
    "family_from",
    "known_families",
    "linear",
    "norm",
    "projection",
    "register_adapter",
    "structure",
    "tensor",
]

ENTRY_POINT_GROUP = "cofiprune.adapters"


class Adapter:
    """A family's adapter: a subclass has the model types and `describe`."""

    model_types: tuple[str, ...] = ()
    """Supported values of `config.model_type`."""
    stored: bool = False
    """True if a compacted model carries the table with it, because no installed package has it."""
    test_settings: Mapping[str, Any] = MappingProxyType({})
    """Settings of the small configurations that `check_adapter` tries, where a model does not run with the defaults."""

    def describe(self, config: PretrainedConfig) -> Family:
        """Return the family's table for one configuration."""
        raise AdapterError(f"{type(self).__name__} has no describe(config); return a Family from it")

    def structure(self, model: PreTrainedModel, *, dense: bool = False) -> Structure:
        """Resolve the table against a model.

        :param dense: read the model as having its configuration's sizes, whatever sizes are recorded in it.
        :raises AdapterError: when a row names a module or a shape that the model does not have.
        """
        path = "" if model.config.model_type in self.model_types else encoder_within(model)
        config: Any = model.get_submodule(path).config if path else model.config
        family = self.describe(config)
        recorded = None if dense else sizes_of(model)
        built = ", whose configuration records a compacted model's sizes (from_config builds those)" if recorded else ""
        with located(f"adapter of {config.model_type!r} on {type(model).__name__}{built}: ", AdapterError):
            found = Resolver(model, family, recorded, path).structure()
        return replace(found, table=family_entries(family)) if self.stored else found


class TableAdapter(Adapter):
    """The adapter of one table, or of a function that makes a table from a configuration."""

    def __init__(
        self,
        model_types: tuple[str, ...],
        table: Family | Callable[[Any], Family],
        *,
        stored: bool = False,
        test_settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.model_types = model_types
        self.table = table
        self.stored = stored
        self.test_settings = test_settings or {}

    def describe(self, config: PretrainedConfig) -> Family:
        return self.table if isinstance(self.table, Family) else self.table(config)


def family(
    *model_types: str, test_settings: Mapping[str, Any] | None = None
) -> Callable[[Callable[[Any], Family]], Adapter]:
    """Make an adapter of a function that returns a family's table for a configuration: `@family("bert")`.

    :param model_types: the `config.model_type` values that it serves.
    :param test_settings: as in `Adapter`.
    """
    return lambda table: TableAdapter(model_types, table, test_settings=test_settings)


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


def known_families() -> tuple[str, ...]:
    """Return the model types that have an adapter, registered or installed, sorted."""
    return tuple(sorted({*_registered, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))}))


def adapter_for(model: PreTrainedModel) -> Adapter:
    """Return the adapter of a model's family: registered, installed, carried by the model, or derived from it.

    :raises AdapterError: for an object that is not a transformers encoder (see `refusals`), or a family that has no
        adapter and for which none can be derived.
    """
    refuse(model)
    model_type = model.config.model_type
    table = recorded_table(model.config)
    if table is not None:
        return TableAdapter((encoder_config(model).model_type,), family_from(table), stored=True)
    if model_type not in _registered:
        installed = _installed(model_type)
        if installed is None:
            path = encoder_within(model)
            if path:
                with located(f"{type(model).__name__} is a head on {path!r}: ", AdapterError):
                    return adapter_for(model.get_submodule(path))  # type: ignore[arg-type]
            refuse_undeclared(model)
            # Deriving runs models and laws, which stand above this module; most models do not need it.
            derived: Adapter = import_module("cofiprune.derivation").derived_adapter(model)
            return derived
        _registered[model_type] = installed
    return _registered[model_type]


def _installed(model_type: str) -> Adapter | None:
    """Load the adapter that an installed package names for a model type; None when none does.

    :raises AdapterError: when packages name different ones, or what one names is no adapter or does not load.
    """
    # An entry point that is found twice (two folders on the path with one package's metadata) is still one adapter.
    points = {point.value: point for point in entry_points(group=ENTRY_POINT_GROUP, name=model_type)}
    if not points:
        return None
    if len(points) > 1:
        named = ", ".join(f"{_package(point)} ({value!r})" for value, point in points.items())
        raise AdapterError(
            f"{len(points)} packages name an adapter for model type {model_type!r}: {named}. Uninstall all but one, or "
            "choose one of them by cofiprune.register_adapter(adapter), which goes before what is installed."
        )
    ((value, point),) = points.items()
    who = f"the adapter of model type {model_type!r} that the package {_package(point)} names, {value!r},"
    try:
        found = point.load()
    except Exception as error:  # importing another package can raise anything
        raise AdapterError(f"{who} cannot be loaded: {type(error).__name__}: {error}") from error
    if isinstance(found, Adapter):
        return found
    what = f"it is a {type(found).__name__}, not a cofiprune.Adapter"
    if isinstance(found, type) and issubclass(found, Adapter):
        what = f"it is the class {found.__name__}; the entry point has to name an instance of it"
    raise AdapterError(f"{who} cannot be used: {what}")


def _package(point: EntryPoint) -> str:
    return "of an unknown name" if point.dist is None else point.dist.name


@names_checked
def structure(model: PreTrainedModel) -> Structure:
    """List the prunable groups of a model: a mapping from group name to `Group`.

    :raises AdapterError: when the model's family has no adapter.
    """
    model = inside(model)
    return adapter_for(model).structure(model)

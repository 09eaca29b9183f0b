"""The record of a compacted model's sizes in its `config.json`.

The configuration keeps the sizes of the dense model, because the modelling code derives the head dimension from them.
The sizes that are left are recorded one number per group under `quantization_config`, because for a quantisation method
`from_pretrained` lets a package change a model's skeleton before its weights are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cofiprune.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

METHOD = "cofiprune"
FORMAT_VERSION = 1
_COMMON = {"quant_method": METHOD, "format_version": FORMAT_VERSION}


def sizes_to_record(sizes: Mapping[str, int]) -> dict[str, Any]:
    """Fold group sizes into one entry per kind, a list over the layers for kinds that have them.

    >>> sizes_to_record({"hidden": 5, "layers.0.heads": 2, "layers.1.heads": 0})
    {'hidden': 5, 'heads': [2, 0]}
    """
    record: dict[str, Any] = {}
    for name, size in sizes.items():
        layer, _, kind = name.rpartition(".")
        record[kind] = [*record.get(kind, []), size] if layer else size
    return record


def record_to_sizes(record: Mapping[str, Any]) -> dict[str, int]:
    """Unfold a record into group sizes; the inverse of `sizes_to_record`."""
    sizes: dict[str, int] = {}
    for kind, value in record.items():
        if isinstance(value, int):
            sizes[kind] = value
        else:
            sizes.update({f"layers.{layer}.{kind}": int(size) for layer, size in enumerate(value)})
    return sizes


def record(sizes: Mapping[str, int], table: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the `quantization_config` of a compacted model's configuration.

    :param table: the family's table as plain values, where no installed adapter has it.
    """
    entries = {**_COMMON, "sizes": sizes_to_record(sizes)}
    return entries if table is None else {**entries, "table": dict(table)}


def record_of_parts(parts: Mapping[str, PretrainedConfig]) -> dict[str, Any]:
    """Return the `quantization_config` of a model with compacted models inside it.

    :param parts: their configurations, with a record each, by the paths of their modules.
    """
    recorded = {
        path: {name: value for name, value in _entries(config).items() if name not in _COMMON}
        for path, config in parts.items()
    }
    return {**_COMMON, "parts": recorded}


def recorded_sizes(config: PretrainedConfig) -> dict[str, int] | None:
    """Return the group sizes recorded in a configuration, or None for a model that is not compacted.

    :raises CheckpointError: when the record was written by a newer version of this package.
    """
    sizes = _entries(config).get("sizes")
    return None if sizes is None else record_to_sizes(sizes)


def recorded_table(config: PretrainedConfig) -> Mapping[str, Any] | None:
    """Return the family's table that a compacted model carries, or None for one that carries none.

    :raises CheckpointError: as `recorded_sizes`.
    """
    return _entries(config).get("table")


def recorded_parts(config: PretrainedConfig) -> dict[str, dict[str, Any]]:
    """Return the entries of the models inside a model, as `record` makes them, by the paths of their modules.

    :raises CheckpointError: as `recorded_sizes`.
    """
    entries = _entries(config)
    common = {name: entries[name] for name in _COMMON if name in entries}
    return {path: {**common, **part} for path, part in entries.get("parts", {}).items()}


def _entries(config: PretrainedConfig) -> Mapping[str, Any]:
    """The record of this package in a configuration; empty where there is none."""
    stored = getattr(config, "quantization_config", None) or {}
    entries: Mapping[str, Any] = stored if isinstance(stored, Mapping) else stored.to_dict()
    if entries.get("quant_method") != METHOD:
        return {}
    version = entries.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"this model was compacted in format {version!r}; this version of cofiprune reads formats up to "
            f"{FORMAT_VERSION}. Upgrade cofiprune to load it."
        )
    return entries

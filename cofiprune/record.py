"""The record of a compacted model's sizes in its `config.json`.

The configuration keeps the sizes of the dense model, because the modelling code derives the head dimension from them.
The sizes that are left are recorded one number per group under `quantization_config`, because for a quantisation method
`from_pretrained` lets a package change a model's skeleton before its weights are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from cofiprune.errors import CheckpointError
from cofiprune.files import STRICT, check_format, digest, validated
from cofiprune.parts import encoder_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

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
        if layer:
            record.setdefault(kind, []).append(size)
        else:
            record[kind] = size
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
    return entries if table is None else {**entries, "table": dict(table), "table_checksum": digest(table)}


def record_of_parts(parts: Mapping[str, PretrainedConfig]) -> dict[str, Any]:
    """Return the `quantization_config` of a model with compacted models inside it.

    :param parts: their configurations, with a record each, by the paths of their modules.
    """
    recorded = {}
    for path, config in parts.items():
        entries = _entries(config)
        assert entries is not None
        recorded[path] = {name: value for name, value in asdict(entries).items() if value}
    return {**_COMMON, "parts": recorded}


def recorded_sizes(config: PretrainedConfig) -> dict[str, int] | None:
    """Return the group sizes recorded in a configuration, or None for a model that is not compacted.

    :raises CheckpointError: when the record is damaged, or was written by a newer version of this package.
    """
    entries = _entries(config)
    return None if entries is None or entries.sizes is None else record_to_sizes(entries.sizes)


def sizes_of(model: PreTrainedModel) -> dict[str, int] | None:
    """Return the group sizes recorded for a model, or for the encoder inside it; None where nothing is compacted.

    :raises CheckpointError: as `recorded_sizes`.
    """
    own = recorded_sizes(model.config)
    return recorded_sizes(encoder_config(model)) if own is None else own


def recorded_table(config: PretrainedConfig) -> Mapping[str, Any] | None:
    """Return the family's table that a compacted model carries, or None for one that carries none.

    :raises CheckpointError: as `recorded_sizes`.
    """
    entries = _entries(config)
    return None if entries is None else entries.table


def recorded_parts(config: PretrainedConfig) -> dict[str, dict[str, Any]]:
    """Return the entries of the models inside a model, as `record` makes them, by the paths of their modules.

    :raises CheckpointError: as `recorded_sizes`.
    """
    entries = _entries(config)
    parts = {} if entries is None else entries.parts
    return {path: {**_COMMON, **part} for path, part in parts.items()}


@dataclass(frozen=True)
class _Record:
    """What `quantization_config` says, but for its method and format."""

    __pydantic_config__ = STRICT

    sizes: dict[str, int | list[int]] | None = None
    table: dict[str, Any] | None = None
    table_checksum: str = ""
    """Empty in records of earlier versions. A table decides what is cut, and few of its faults show in a shape."""
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = record_to_sizes(self.sizes or {})
        if any(size < 0 for size in sizes.values()) or sizes.get("hidden") == 0:
            raise ValueError(f"sizes must not be negative, and hidden dimensions must stay: {self.sizes}")
        if (not sizes) == (not self.parts):
            raise ValueError("it states either sizes or parts")
        if self.table_checksum and self.table_checksum != digest(self.table):
            raise ValueError("its table was changed")


def _entries(config: PretrainedConfig) -> _Record | None:
    """The record of this package in a configuration, or None."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    entries = dict(stored if isinstance(stored, Mapping) else stored.to_dict())
    if entries.pop("quant_method", None) != METHOD:
        return None
    problem = "the record of a compacted model in config.json cannot be read"
    check_format(entries.pop("format_version", None), FORMAT_VERSION, CheckpointError, problem)
    return validated(_Record, entries, CheckpointError, problem)

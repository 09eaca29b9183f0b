"""Write a derived table as an adapter file, ready to be edited."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cofiprune import adapter
from cofiprune.adapter import (
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    Axis,
    BlockTable,
    ConfigSizes,
    Family,
    Weights,
    embedding,
    linear,
    norm,
    projection,
    tensor,
)
from cofiprune.conformance.specimens import head_classes, small_config
from cofiprune.derivation.derive import Derived, derive
from cofiprune.structure import BlockExit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WIDTH = 100
_AXES = {"HEADS": HEADS, "HIDDEN": HIDDEN, "INTERMEDIATE": INTERMEDIATE}


def written_adapter(model: PreTrainedModel) -> str:
    """Derive a model's family, with every head class that transformers has for it, and return its adapter file.

    :raises AdapterError: when nothing can be derived from the model.
    """
    derived = derive(model)
    stem = {row.modules: row for row in derived.family.stem}
    heads = dict(derived.family.heads)
    for cls in head_classes(model.config):
        try:
            other = derive(cls(small_config(model.config))).family
        except Exception:  # a head that does not fit the configuration is left out
            continue
        heads.update(other.heads)
        for row in other.stem:
            stem.setdefault(row.modules, row)
    # Which of these rows a model has may depend on its head.
    rows = tuple(replace(row, optional=True) for row in stem.values())
    shown = {name: heads[name] for name in sorted(heads) if not name.endswith(("Model", "Encoder"))}
    return _file(model.config.model_type, replace(derived, family=replace(derived.family, stem=rows, heads=shown)))


class _Code(str):
    """A Python expression that is written as it is."""


def _file(model_type: str, derived: Derived) -> str:
    family, expressions = derived.family, derived.settings.expressions
    settings = {kind: text.removeprefix("config.") for kind, text in expressions.items()}
    stated: dict[Any, str] = {kind: name for kind, name in settings.items() if name.isidentifier()}
    computed = {kind: _Code(text) for kind, text in expressions.items() if kind not in stated}
    blocks = {"attention": _Code("ATTENTION"), "ffn": _Code("FFN")}
    table = {**vars(family), **blocks, "config": ConfigSizes(**stated), "sizes": computed}
    blocks_text = "\n".join(["ATTENTION = " + _text(family.attention), "FFN = " + _text(family.ffn)])
    lines = "\n    ".join(_call(Family, {name: value for name, value in table.items() if value != {}}))
    text = f'{blocks_text}\n\n\n@family("{model_type}")\ndef adapter(config):\n    return {lines}\n'
    used = "".join(f"    {name},\n" for name in adapter.__all__ if re.search(rf"(?<![\w.\"]){name}\b(?!=)", text))
    return (
        f'"""{model_type}: derived, and proved on a small model. Names and axes may be edited; check the result."""\n\n'
        f"from cofiprune.adapter import (\n{used})\n\n{text}"
    )


def _text(value: Any) -> str:
    return "\n".join(_lines(value))


def _lines(value: Any) -> list[str]:
    """A value as the lines of a Python expression."""
    if isinstance(value, _Code):
        return [value]
    if isinstance(value, str):
        return [json.dumps(value)]
    if isinstance(value, Axis):
        return [_axis(value)]
    if isinstance(value, Mapping):
        return _joined("{", [_named(f"{json.dumps(name)}: ", each) for name, each in value.items()], "}")
    if isinstance(value, tuple):
        return _joined("(", [_lines(each) for each in value], ",)" if len(value) == 1 else ")")
    if isinstance(value, Weights):
        return _row(value)
    if isinstance(value, BlockExit | BlockTable | ConfigSizes):
        return _call(type(value), vars(value))
    return [repr(value)]


def _joined(opening: str, parts: list[list[str]], closing: str) -> list[str]:
    """Parts of an expression on one line, or, where that is long, on lines of their own."""
    line = opening + ", ".join(part[0] for part in parts) + closing
    if len(line) <= _WIDTH and all(len(part) == 1 for part in parts):
        return [line]
    return [opening, *(f"    {line}" for part in parts for line in (*part[:-1], f"{part[-1]},")), closing[-1]]


def _named(prefix: str, value: Any) -> list[str]:
    first, *more = _lines(value)
    return [prefix + first, *more]


def _call(make: Callable[..., Any], values: Mapping[str, Any]) -> list[str]:
    """A call with the arguments that differ from their default values."""
    parts = []
    for name, parameter in inspect.signature(make).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            parts += [_lines(each) for each in values[name]]
        elif name in values and values[name] != parameter.default:
            given_by_name = parameter.kind is parameter.KEYWORD_ONLY or parameter.default is not parameter.empty
            parts.append(_named(f"{name}=" if given_by_name else "", values[name]))
    return _joined(f"{make.__name__}(", parts, ")")


def _row(row: Weights) -> list[str]:
    """A row by the function that makes it; by the class where none does."""
    writes, reads = (*row.tensors.get("weight", ()), None, None)[:2]
    unscaled = None if reads is None else replace(reads, role="slice")
    shorthands: list[tuple[Callable[..., Weights], dict[str, Any]]] = [
        (norm, {"kind": row.norm, "read_by": row.read_by, "optional": row.optional}),
        (embedding, {"writes": unscaled, "optional": row.optional}),
        (linear, {"reads": reads, "writes": writes, "rows": row.rows, "optional": row.optional}),
    ]
    if unscaled is not None:
        shorthands.append((projection, {"reads": unscaled}))
    for make, settings in shorthands:
        if make(row.modules, **settings) == row:
            return _call(make, {"modules": row.modules, **settings})
    for name, axes in row.tensors.items():
        if tensor(row.modules, name, *axes, optional=row.optional) == row:
            return _call(tensor, {"module": row.modules, "name": name, "axes": axes, "optional": row.optional})
    return _call(Weights, vars(row))


def _axis(axis: Axis) -> str:
    name, base = next((name, base) for name, base in _AXES.items() if base.kind == axis.kind)
    text = name if axis.copies == 1 else f"{name}.times({axis.copies})"
    text += "" if axis.block == base.block else f".of({axis.block})"
    return text + {"slice": "", "scale": ".scaled", "zero": ".zeroed"}[axis.role]

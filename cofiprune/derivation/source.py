"""Write a derived table as an adapter file, ready to be edited."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
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
    stated: dict[Any, Any] = {kind: name for kind, name in settings.items() if name.isidentifier()}
    staged = "*" in family.layers  # a list of settings with an entry for each stage
    stated = {kind: name for kind, name in stated.items() if not staged}
    computed = {
        kind: _Code(f"tuple({text})" if staged and kind in settings and settings[kind].isidentifier() else text)
        for kind, text in expressions.items()
        if kind not in stated
    }
    blocks = {"attention": _Code("ATTENTION"), "ffn": _Code("FFN")}
    table = {**vars(family), **blocks, "config": ConfigSizes(**stated), "sizes": computed}
    blocks_text = "\n".join(["ATTENTION = " + _text(family.attention), "FFN = " + _text(family.ffn)])
    lines = _text(
        partial(Family, **{name: value for name, value in table.items() if value not in ({}, ConfigSizes())}), "    "
    )
    text = f'{blocks_text}\n\n\n@family("{model_type}")\ndef adapter(config):\n    return {lines}\n'
    used = "".join(f"    {name},\n" for name in adapter.__all__ if re.search(rf"(?<![\w.\"]){name}\b(?!=)", text))
    return (
        f'"""{model_type}: derived, and proved on a small model. Names and axes may be edited; check the result."""\n\n'
        f"from cofiprune.adapter import (\n{used})\n\n{text}"
    )


def _text(value: Any, indent: str = "") -> str:
    """A value as a Python expression, on several lines where one is too long."""
    if isinstance(value, _Code):
        return value
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, Axis):
        return _axis(value)
    if isinstance(value, Mapping):
        opening, closing = "{", "}"
        parts = [(f"{json.dumps(name)}: ", each) for name, each in value.items()]
    elif isinstance(value, tuple):
        opening, closing = "(", ",)" if len(value) == 1 else ")"
        parts = [("", each) for each in value]
    elif isinstance(value, Weights | BlockExit | BlockTable | ConfigSizes | partial):
        call = value if isinstance(value, partial) else _call(value)
        opening, closing = f"{call.func.__name__}(", ")"
        parts = _arguments(call)
    else:
        return repr(value)
    line = opening + ", ".join(prefix + _text(each) for prefix, each in parts) + closing
    if len(line) <= _WIDTH and "\n" not in line:
        return line
    inner = f"{indent}    "
    lines = [f"{inner}{prefix}{_text(each, inner)},\n" for prefix, each in parts]
    return f"{opening}\n{''.join(lines)}{indent}{closing[-1]}"


def _arguments(call: partial[Any]) -> list[tuple[str, Any]]:
    """The arguments of a call that differ from their default values, each with `name=` where it needs that."""
    parts: list[tuple[str, Any]] = []
    values = call.keywords
    for name, parameter in inspect.signature(call.func).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            parts += [("", each) for each in values[name]]
        elif name in values and values[name] != parameter.default:
            given_by_name = parameter.kind is parameter.KEYWORD_ONLY or parameter.default is not parameter.empty
            parts.append((f"{name}=" if given_by_name else "", values[name]))
    return parts


def _call(value: object) -> partial[Any]:
    """The call that makes an object: of weights, by the function that makes them where there is one."""
    if not isinstance(value, Weights):
        return partial(type(value), **vars(value))
    writes, reads = (*value.tensors.get("weight", ()), None, None)[:2]
    unscaled = None if reads is None else replace(reads, role="slice")
    common: dict[str, Any] = {"modules": value.modules, "optional": value.optional}
    calls: list[partial[Weights]] = [
        partial(norm, **common, kind=value.norm or "layer", read_by=value.read_by),
        partial(embedding, **common, writes=unscaled),
        partial(linear, **common, reads=reads, writes=writes, rows=value.rows),
    ]
    if unscaled is not None:
        calls.append(partial(projection, modules=value.modules, reads=unscaled))
    for call in calls:
        if call() == value:
            return call
    make: Any = tensor
    for name, axes in value.tensors.items():
        if tensor(value.modules, name, *axes, optional=value.optional) == value:
            return partial(make, module=value.modules, name=name, axes=axes, optional=value.optional)
    return partial(Weights, **vars(value))


def _axis(axis: Axis) -> str:
    name, base = next((name, base) for name, base in _AXES.items() if base.kind == axis.kind)
    text = name if axis.copies == 1 else f"{name}.times({axis.copies})"
    text += "" if axis.block == base.block else f".of({axis.block})"
    return text + {"slice": "", "scale": ".scaled", "zero": ".zeroed"}[axis.role]

"""Write a derived table as an adapter file, ready to be edited."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from cofiprune.adapter import Axis, BlockTable, ConfigSizes, Weights
from cofiprune.conformance.specimens import head_classes
from cofiprune.derivation.derive import Derived, derive
from cofiprune.derivation.tiny_copy import small_config
from cofiprune.structure import BlockExit, Kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAMES: Mapping[str, str] = {"hidden": "HIDDEN", "heads": "HEADS", "intermediate": "INTERMEDIATE"}


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
    # Which of these a model has may depend on its head.
    rows = tuple(replace(row, optional=True) for row in stem.values())
    shown = {name: heads[name] for name in sorted(heads) if not name.endswith(("Model", "Encoder"))}
    derived = replace(derived, family=replace(derived.family, stem=rows))
    return adapter_source(model.config.model_type, derived, shown)


def adapter_source(model_type: str, derived: Derived, heads: Mapping[str, tuple[Weights, ...]]) -> str:
    """Return the text of a Python file with an adapter that describes what was derived.

    :param model_type: of the family.
    :param heads: rows of every head class that was derived, by the class's name.
    """
    family = derived.family
    refused = (f'            "{unit}": {json.dumps(why)},' for unit, why in family.refused.items())
    body = [
        f"ATTENTION = {_block(family.attention)}",
        f"FFN = {_block(family.ffn)}",
        "",
        "",
        f'@family("{model_type}")',
        "def adapter(config):",
        "    return Family(",
        f'        layers="{family.layers}",',
        *_sizes(derived.settings.expressions),
        f"        stem={_rows(family.stem, 8)},",
        "        attention=ATTENTION,",
        "        ffn=FFN,",
        "        heads={",
        *(f'            "{name}": {_rows(rows, 12)},' for name, rows in heads.items()),
        "        },",
        *(("        refused={", *refused, "        },") if family.refused else ()),
        "    )",
    ]
    text = "\n".join(body)
    used = [name for name in _IMPORTS if re.search(rf"\b{name}\b", text)]
    head = [
        f'"""{model_type}: derived, and proved on a small model. Names and axes may be edited; check the result."""',
        "",
        "from cofiprune.adapter import (",
        *(f"    {name}," for name in used),
        ")",
    ]
    return "\n".join([*head, "", text, ""])


def _sizes(expressions: Mapping[Kind, str]) -> Iterator[str]:
    """The arguments that say where the configuration has the sizes."""
    settings = {kind: text.removeprefix("config.") for kind, text in expressions.items()}
    stated = {kind: name for kind, name in settings.items() if name.isidentifier()}
    named = [f'{kind}="{name}"' for kind, name in stated.items() if name != getattr(ConfigSizes, kind)]
    if named:
        yield f"        config=ConfigSizes({', '.join(named)}),"
    computed = [f'"{kind}": {text}' for kind, text in expressions.items() if kind not in stated]
    if computed:
        yield f"        sizes={{{', '.join(computed)}}},"


_IMPORTS = (
    "HEADS",
    "HIDDEN",
    "INTERMEDIATE",
    "BlockExit",
    "BlockTable",
    "ConfigSizes",
    "Family",
    "Weights",
    "embedding",
    "family",
    "linear",
    "norm",
    "projection",
    "tensor",
)


def _block(table: BlockTable) -> str:
    lines = ["BlockTable(", f"    rows={_rows(table.rows, 4)},", f"    exit={_exit(table.exit)},"]
    if table.bypassed:
        lines.append(f"    bypassed={_tuple((_exit(each) for each in table.bypassed), 4)},")
    if table.dropped:
        lines.append(f"    dropped={_tuple((json.dumps(each) for each in table.dropped), 4)},")
    if table.attributes:
        shown = (f'("{module}", "{name}", {_axis(axis)})' for module, name, axis in table.attributes)
        lines.append(f"    attributes={_tuple(shown, 4)},")
    return "\n".join([*lines, ")"])


def _rows(rows: Iterable[Weights], indent: int) -> str:
    return _tuple((_row(row) for row in rows), indent)


def _tuple(parts: Iterable[str], indent: int) -> str:
    found = list(parts)
    if not found:
        return "()"
    margin = " " * (indent + 4)
    return "\n".join(["(", *(f"{margin}{part}," for part in found), " " * indent + ")"])


def _row(row: Weights) -> str:
    """A row by the function that makes it; by the class where none does."""
    more = ["optional=True"] if row.optional else []
    name = json.dumps(row.modules)
    sides = row.tensors.get("weight", ())
    if row.norm is not None:
        kinds = ['kind="rms"'] if row.norm == "rms" else []
        read_by = [f'read_by="{row.read_by}"'] if row.read_by else []
        return f"norm({', '.join([name, *kinds, *read_by, *more])})"
    if row.table:
        return f"embedding({', '.join([name, *more])})"
    stored = (row.rows != (0, 0) or row.gated) and tuple(row.tensors) == ("weight", "bias")
    if stored and len(sides) == 2 and tuple(row.tensors["bias"]) == (sides[0],):
        if row.gated:
            inner = sides[1]
            assert inner is not None
            return f"projection({name}, reads={_NAMES[inner.kind]})"
        reads = [] if sides[1] is None else [f"reads={_axis(sides[1])}"]
        writes = [] if sides[0] is None else [f"writes={_axis(sides[0])}"]
        rows = [] if row.rows == (1, 0) else [f"rows={row.rows}"]
        return f"linear({', '.join([name, *reads, *writes, *rows, *more])})"
    if len(row.tensors) == 1 and row.rows == (0, 0) and not row.gated:
        ((local, axes),) = row.tensors.items()
        return f"tensor({', '.join([name, json.dumps(local), *(_axis(axis) for axis in axes), *more])})"
    tensors = ", ".join(
        f'"{local}": ({"".join(f"{_axis(axis)}, " for axis in axes)})' for local, axes in row.tensors.items()
    )
    gated = ["gated=True"] if row.gated else []
    rows = [] if row.rows == (0, 0) else [f"rows={row.rows}"]
    return f"Weights({', '.join([name, '{' + tensors + '}', *gated, *rows, *more])})"


def _axis(axis: Axis | None) -> str:
    if axis is None:
        return "None"
    text = _NAMES[axis.kind]
    if axis.copies != 1:
        text += f".times({axis.copies})"
    if axis.block is not None:
        text += f".of({axis.block})"
    return text + {"slice": "", "scale": ".scaled", "zero": ".zeroed"}[axis.role]


def _exit(exit: str | BlockExit) -> str:
    if isinstance(exit, str):
        return json.dumps(exit)
    plain = BlockExit(exit.module)
    given: list[tuple[str, Any]] = [
        (each.name, getattr(exit, each.name))
        for each in fields(BlockExit)
        if getattr(exit, each.name) != getattr(plain, each.name)
    ]
    named = [f"{name}={json.dumps(value) if isinstance(value, str) else value}" for name, value in given]
    return f"BlockExit({', '.join([json.dumps(exit.module), *named])})"

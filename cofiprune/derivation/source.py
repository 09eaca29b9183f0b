"""Writing a derived table down as the adapter file that it would be, ready to be saved and edited."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from cofiprune.adapter import Axis, BlockTable, Family, Weights
from cofiprune.conformance.specimens import head_classes
from cofiprune.derivation.derive import Derived, derive
from cofiprune.derivation.tiny_copy import small_config
from cofiprune.structure import BlockExit

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
        except Exception:  # of whatever kind: a head that does not fit the configuration is left out
            continue
        heads.update(other.heads)
        for row in other.stem:
            stem.setdefault(row.modules, row)
    # Which of these a model has may depend on its head.
    rows = tuple(replace(row, optional=True) for row in stem.values())
    shown = {name: heads[name] for name in sorted(heads) if not _is_bare(name)}
    derived = replace(derived, family=replace(derived.family, stem=rows))
    return adapter_source(model.config.model_type, derived, shown)


def _is_bare(name: str) -> bool:
    return name.endswith(("Model", "Encoder"))


def adapter_source(model_type: str, derived: Derived, heads: Mapping[str, tuple[Weights, ...]]) -> str:
    """Return the text of a Python file with an adapter that describes what was derived.

    :param model_type: of the family.
    :param heads: rows of every head class that was derived, by the class's name.
    """
    family, spelt = derived.family, derived.settings.spelt
    body = [
        f"ATTENTION = {_block(family.attention)}",
        f"FFN = {_block(family.ffn)}",
        "",
        "",
        f"class {_class_name(model_type)}(Adapter):",
        f'    model_types = ("{model_type}",)',
        "",
        "    def describe(self, config):",
        "        return Family(",
        "            sizes={",
        *(f'                "{kind}": {text},' for kind, text in spelt.items()),
        "            },",
        f'            layers="{family.layers}",',
        f"            stem={_rows(family.stem, 12)},",
        "            attention=ATTENTION,",
        "            ffn=FFN,",
        "            heads={",
        *(f'                "{name}": {_rows(rows, 16)},' for name, rows in heads.items()),
        "            },",
        *_refused(family),
        "        )",
        "",
        "",
        f"adapter = {_class_name(model_type)}()",
    ]
    text = "\n".join(body)
    head = [
        f'"""{model_type}: derived, and proved on a small model; what it says of names and axes may be edited."""',
        "",
    ]
    used = [name for name in _IMPORTS if any(f"{name}{after}" in text for after in "(),. \n")]
    head += ["from cofiprune.adapter import (", *(f"    {name}," for name in used), ")"]
    if "BlockExit(" in text:
        head.append("from cofiprune.structure import BlockExit")
    return "\n".join([*head, "", text, ""])


_IMPORTS = (
    "HEADS",
    "HIDDEN",
    "INTERMEDIATE",
    "Adapter",
    "BlockTable",
    "Family",
    "Weights",
    "embedding",
    "linear",
    "norm",
    "projection",
    "tensor",
)


def _class_name(model_type: str) -> str:
    return "".join(part.capitalize() for part in model_type.replace("_", "-").split("-")) + "Adapter"


def _block(table: BlockTable) -> str:
    lines = ["BlockTable(", f"    rows={_rows(table.rows, 4)},", f"    exit={_exit(table.exit)},"]
    if table.bypassed:
        lines.append(f"    bypassed={_tuple((_exit(each) for each in table.bypassed), 4)},")
    if table.dropped:
        lines.append(f"    dropped={_tuple((_quoted(each) for each in table.dropped), 4)},")
    if table.attributes:
        shown = (f"({_quoted(module)}, {_quoted(name)}, {_axis(axis)})" for module, name, axis in table.attributes)
        lines.append(f"    attributes={_tuple(shown, 4)},")
    return "\n".join([*lines, ")"])


def _refused(family: Family) -> Iterable[str]:
    if family.refused:
        yield "            refused={"
        for unit, why in family.refused.items():
            yield f'                "{unit}": {_quoted(why)},'
        yield "            },"


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
    name = _quoted(row.modules)
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
        return f"tensor({', '.join([name, _quoted(local), *(_axis(axis) for axis in axes), *more])})"
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
        return _quoted(exit)
    plain = BlockExit(exit.module)
    given: list[tuple[str, Any]] = [
        (each.name, getattr(exit, each.name))
        for each in fields(BlockExit)
        if getattr(exit, each.name) != getattr(plain, each.name)
    ]
    named = [f"{name}={_quoted(value) if isinstance(value, str) else value}" for name, value in given]
    return f"BlockExit({', '.join([_quoted(exit.module), *named])})"


def _quoted(text: str) -> str:
    return json.dumps(text)

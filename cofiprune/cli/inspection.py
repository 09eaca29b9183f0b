"""`cofiprune inspect`: what a model is made of, what of it can go, and what cannot."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cofiprune.cli.models import add_model_options, load_model, model_name
from cofiprune.cli.parser import at_least
from cofiprune.structure import UNIT_KINDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cofiprune.structure import Structure


def add_inspect_options(parser: argparse.ArgumentParser) -> None:
    """Add what `inspect` takes."""
    add_model_options(parser)
    parser.add_argument(
        "--seq-len", type=at_least(1), default=128, metavar="N", help="tokens for which MACs are counted (default: 128)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--write-adapter", metavar="FILE", help="derive the family from the model and write the adapter file for it"
    )


def inspect(options: argparse.Namespace) -> None:
    """Print size and structure."""
    model = load_model(model_name(options), options.task)
    from cofiprune.adapter import structure
    from cofiprune.measure.summary import summary

    if options.write_adapter:
        _write_adapter(model, options.write_adapter)
        return
    table = structure(model)
    report = summary(model, seq_len=options.seq_len)
    if options.json:
        print(json.dumps(_entries(table, report)))
        return
    from cofiprune.measure.report import as_text, rich_table

    rows = [
        [name, f"{units:,}", f"{parameters:,}", f"{parameters / units:,.0f}"]
        for name, units, parameters in _groups(table)
    ]
    print(report)
    print()
    print(as_text(rich_table(["group", "units", "parameters of it", "per unit"], rows)))
    print()
    print("\n".join(_verdict(table)))


def _write_adapter(model: PreTrainedModel, file: str) -> None:
    """Write what is derived from a model as an adapter file.

    :raises SettingsError: when there is such a file already, which may have been edited.
    """
    from cofiprune.derivation.source import written_adapter
    from cofiprune.errors import SettingsError

    if Path(file).exists():
        raise SettingsError(f"{file} exists; name another file, or remove it")
    text = written_adapter(model)
    Path(file).write_text(text, encoding="utf-8")
    print(
        f"{file}: the adapter of {model.config.model_type}. Edit it, check it with cofiprune.check_adapter(adapter), "
    )
    print("and register it with cofiprune.register_adapter(adapter).")


def _groups(structure: Structure) -> list[tuple[str, int, int]]:
    """Name, units and parameters of each group: those that would be gone with it, the rest being there."""
    from cofiprune.accounting import model_parameters

    cost, sizes = model_parameters(structure), structure.sizes
    whole = cost.exact(sizes)
    return [(name, size, whole - cost.exact({**sizes, name: 0})) for name, size in sizes.items()]


def _verdict(structure: Structure) -> list[str]:
    """What can be pruned, how far, and what cannot and why."""
    present = {group.unit for group in structure.groups}
    how = "declared" if structure.table is None else "derived from the model, and proved on it"
    lines = [f"family: {structure.family}, {how}"]
    lines += [f"can be pruned: {', '.join(unit for unit in UNIT_KINDS if unit in present) or 'nothing'}"]
    if present:
        lines[1] += f"; up to a sparsity of {_highest(structure):.4f}"
    for unit in UNIT_KINDS:
        if unit not in present:
            lines.append(f"cannot be pruned: {unit}: {structure.refused.get(unit, 'no such units are left')}")
    return lines


def _highest(structure: Structure) -> float:
    from cofiprune.accounting import layer_parameters
    from cofiprune.selection.reachable import reachable

    return reachable(structure, layer_parameters(structure)).highest


def _entries(structure: Structure, report: Any) -> dict[str, Any]:
    """The report as plain values."""
    from dataclasses import asdict

    return {
        **asdict(report),
        "sparsity": report.sparsity,
        "model_sparsity": report.model_sparsity,
        "groups": [
            {"name": name, "units": units, "parameters": parameters} for name, units, parameters in _groups(structure)
        ],
        "refused": dict(structure.refused),
        "highest_sparsity": _highest(structure) if structure.groups else 0.0,
    }

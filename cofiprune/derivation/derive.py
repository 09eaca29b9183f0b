"""Deriving the table of a family from a model of it that runs, and proving it before it is used.

Blocks, axes and exits come from watching a small double of the model (`twin`). Where the run leaves a choice, in which
order a fused matrix holds its parts, say, the laws of the masks choose. What cannot be pruned exactly is refused, with
what the law found at fault.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cofiprune.adapter import BlockTable, Family, encoder_path
from cofiprune.conformance.specimens import Batch
from cofiprune.conformance.trace import inside
from cofiprune.derivation.blocks import Draft, find_blocks, find_layers
from cofiprune.derivation.exits import Way, find_ways
from cofiprune.derivation.mixing import mixes
from cofiprune.derivation.proof import problem
from cofiprune.derivation.rows import Inner, attributes, block_rows
from cofiprune.derivation.settings import Settings, find_settings
from cofiprune.derivation.surroundings import find_surroundings
from cofiprune.derivation.trace import watch
from cofiprune.derivation.twin import twin_of
from cofiprune.errors import AdapterError
from cofiprune.structure import BlockExit, Kind, unit_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Part:
    """One block kind of the family: its draft in every layer, and how the blocks leave."""

    kind: Kind
    drafts: list[Draft]
    others: list[Draft]
    ways: list[Way]


@dataclass
class Derived:
    """A derived table and how its sizes are spelt in the configuration."""

    family: Family
    settings: Settings


def derive(model: PreTrainedModel) -> Derived:
    """Derive the table of a model's family on a double of it.

    :raises AdapterError: when it has no blocks that can be told apart or taken out, saying what was found.
    """
    twin, batch = twin_of(model)
    return _Derivation(twin, batch).run()


class _Derivation:
    """One derivation, on one small model."""

    def __init__(self, model: PreTrainedModel, batch: Batch) -> None:
        self.model = model
        self.batch = batch
        self.calls = watch(model, batch)
        count = getattr(model.config, "num_hidden_layers", None)
        self.list = find_layers(model, count if isinstance(count, int) else None)
        self.base = encoder_path(model)
        if not inside(self.list, self.base):
            raise AdapterError(f"its layers {self.list!r} do not lie in its base model {self.base!r}")
        self.layers = [f"{self.list}.{name}" for name, _ in model.get_submodule(self.list).named_children()]

    def run(self) -> Derived:
        attention, ffn = self._parts()
        width = attention.drafts[0].entries[0].shape[-1]
        inner_width = _width(attention)
        settings = find_settings(self.model.config, width, inner_width, _width(ffn), self._narrow(attention))
        self.width = width
        table = self._tables(attention, ffn, settings)
        family = self._family(table, settings)
        family = self._with_hidden(family, (attention, ffn), settings)
        found = problem(self.model, self.batch, family, None, whole=True)
        if found:
            raise AdapterError(found)
        return Derived(family, settings)

    def _parts(self) -> tuple[Part, Part]:
        """Attention and feed-forward in every layer: the first block that mixes tokens is attention."""
        drafts, ways = [], []
        for layer in self.layers:
            blocks = find_blocks(self.calls, layer)
            found = find_ways(self.model, self.batch, self.calls, layer, blocks)
            if found is None:
                raise AdapterError(
                    f"in its layer {layer!r} no module was found through which the states leave unchanged when "
                    f"{blocks[0].writer.path!r} or {blocks[1].writer.path!r} writes nothing"
                )
            drafts.append(blocks)
            ways.append(found)
        order = [mixes(self.model, self.batch, self.layers[0], drafts[0][place].writer.path) for place in (0, 1)]
        if not any(order):
            raise AdapterError(f"no block of its layer {self.layers[0]!r} lets tokens look at one another")
        first = 0 if order[0] else 1
        # Not the last one: some models pad their inputs further.
        late = min(5, drafts[0][0].entries[0].shape[-2] - 1)
        looks_ahead = mixes(self.model, self.batch, self.layers[0], drafts[0][first].writer.path, token=late)
        if not looks_ahead and _generates(self.model):
            raise AdapterError(
                "each of its tokens sees those before it only, and its kind generates: it is a decoder, and cofiprune "
                "prunes encoders"
            )
        kinds: tuple[tuple[Kind, int], ...] = (("heads", first), ("intermediate", 1 - first))
        attention, ffn = (
            Part(kind, [each[place] for each in drafts], [each[1 - place] for each in drafts], [w[place] for w in ways])
            for kind, place in kinds
        )
        return attention, ffn

    def _narrow(self, attention: Part) -> int:
        """The smallest width of what attention makes of the stream: keys and values may be shared."""
        draft = attention.drafts[0]
        widths = [call.output.shape[-1] for call in draft.readers if call.output is not None]
        return min([_width(attention), *widths])

    def _tables(self, attention: Part, ffn: Part, settings: Settings) -> tuple[BlockTable, BlockTable, dict[str, str]]:
        """The tables of both blocks; of the choices that are left the first with which the law holds."""
        refused: dict[str, str] = {}
        tables = []
        for part in (attention, ffn):
            unit = unit_of(part.kind)
            first: BlockTable | None = None
            trouble = ""
            for table in self._choices(part, settings):
                first = first or table
                pair = {part.kind: table}
                other = ffn if part is attention else attention
                pair[other.kind] = next(self._choices(other, settings))
                tried = self._family((pair["heads"], pair["intermediate"], {}), settings)
                found = problem(self.model, self.batch, tried, (unit,))
                if not found:
                    tables.append(table)
                    break
                trouble = trouble or found
            else:
                refused[unit] = trouble
                assert first is not None
                tables.append(first)
        return tables[0], tables[1], refused

    def _choices(self, part: Part, settings: Settings) -> Iterator[BlockTable]:
        units = settings.units[part.kind]
        inner = Inner(part.kind, units, _width(part), settings.query_heads if part.kind == "heads" else None)
        fused = any(
            call.output is not None and call.output.shape[-1] in (2 * inner.width, 3 * inner.width)
            for call in part.drafts[0].readers
        )
        for spelt in (inner, replace(inner, interleaved=True)) if fused else (inner,):
            tables = [self._table(part, index, spelt) for index in range(len(self.layers))]
            merged = _merged(tables, self.layers)
            layer = self.model.get_submodule(self.layers[-1])
            for choice in attributes(layer, self.layers[-1], part.drafts[-1], spelt):
                yield replace(merged, attributes=choice)

    def _table(self, part: Part, index: int, inner: Inner) -> BlockTable:
        path, way = self.layers[index], part.ways[index]
        layer = self.model.get_submodule(path)
        rows = block_rows(layer, path, part.drafts[index], part.others[index], inner, self.width, way.held)

        def local(exit: BlockExit) -> BlockExit:
            return replace(exit, module=exit.module.removeprefix(f"{path}."))

        bypassed = tuple(_short(local(each)) for each in way.bypassed)
        return BlockTable(rows=rows, exit=local(way.exit), bypassed=bypassed, dropped=way.held)

    def _family(self, tables: tuple[BlockTable, BlockTable, dict[str, str]], settings: Settings) -> Family:
        attention, ffn, refused = tables
        return Family(
            sizes=settings.units,
            layers=self.list.removeprefix(self.base).lstrip("."),
            stem=(),
            attention=attention,
            ffn=ffn,
            refused={"hidden": "nothing is known yet of what stands around the layers", **refused},
        )

    def _with_hidden(self, family: Family, parts: Sequence[Part], settings: Settings) -> Family:
        """Add what stands around the layers, and allow hidden dimensions where the law then holds for them."""
        writers = [call.path for part in parts for draft in part.drafts for call in (draft.writer, *draft.norms)]
        around = find_surroundings(self.model, self.batch, self.layers, self.base, self.width, writers)
        refused = {unit: why for unit, why in family.refused.items() if unit != "hidden"}
        name = type(self.model).__name__
        wide = replace(family, stem=tuple(around.stem), heads={name: tuple(around.head)}, refused=refused)
        found = problem(self.model, self.batch, wide, ("hidden",))
        return replace(wide, refused={**refused, "hidden": found}) if found else wide


def _generates(model: PreTrainedModel) -> bool:
    """Whether there is a class that generates beside a model's own: some encoders of text look back only, too."""
    beside = vars(sys.modules[type(model).__module__])
    return any(word in name for name in beside for word in ("ForCausal", "LMHead"))


def _width(part: Part) -> int:
    entry = part.drafts[0].writer.entry
    assert entry is not None
    return entry.shape[-1]


def _short(exit: BlockExit) -> str | BlockExit:
    return exit.module if exit == BlockExit(exit.module) else exit


def _merged(tables: Sequence[BlockTable], layers: Sequence[str]) -> BlockTable:
    """One table for all layers: what only some of them have is optional.

    :raises AdapterError: when blocks leave their layers in different ways.
    """
    last = tables[-1]
    for table, path in zip(tables, layers, strict=True):
        if table.exit != last.exit:
            raise AdapterError(
                f"its layers differ: a block leaves {layers[-1]!r} through {last.exit}, {path!r} through {table.exit}"
            )
    rows = {row.modules: row for table in reversed(tables) for row in reversed(table.rows)}
    ordered = [row.modules for row in last.rows] + [name for name in rows if name not in {r.modules for r in last.rows}]
    everywhere = set.intersection(*({row.modules for row in table.rows} for table in tables))
    bypassed = dict.fromkeys(itertools.chain.from_iterable(table.bypassed for table in tables))
    return replace(
        last,
        rows=tuple(replace(rows[name], optional=name not in everywhere) for name in ordered),
        bypassed=tuple(bypassed),
    )

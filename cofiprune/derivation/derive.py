"""Derive the table of an undeclared family from a model of it, and prove the table before it is used.

Blocks, axes and exits come from watching a tiny copy of the model. Where the run leaves a choice, such as the order of
the parts in a fused matrix, the laws of the masks choose. Units that cannot be pruned exactly are refused, with the
reason that the law found. A table is derived once per class and configuration.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from cofiprune.adapter import Adapter, Axis, BlockTable, Family, TableAdapter, encoder_path
from cofiprune.conformance.battery import check_laws
from cofiprune.conformance.calls import calls_of, compared, inside, size
from cofiprune.conformance.specimens import Batch, Subject, inputs, outputs, random_values, tiny_copy
from cofiprune.derivation.blocks import Draft, find_blocks, find_layers, mixes, weight_shape
from cofiprune.derivation.exits import Bypass, find_bypasses
from cofiprune.derivation.rows import Inner, Settings, attributes, block_rows, find_narrow, find_settings, find_shared
from cofiprune.derivation.surroundings import find_surroundings
from cofiprune.errors import AdapterError, CofipruneError, explained
from cofiprune.hooks import reading
from cofiprune.masking import masks_of
from cofiprune.parts import heads_of_stages
from cofiprune.resolving import members, stages_of
from cofiprune.structure import UNIT_KINDS, BlockExit, Kind, UnitKind, unit_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Largest difference allowed on the model itself, relative to its outputs: what trained weights round to."""
_COARSE = 0.1
"""The same for half precision."""

_STAGES = "each of its stages has hidden dimensions of its own, which the module between two stages mixes"

_known: dict[tuple[type, str], Adapter | str] = {}
_of_models: WeakKeyDictionary[PreTrainedModel, Adapter] = WeakKeyDictionary()
"""While a model is masked it keeps its adapter, whatever settings are changed: it cannot be tried again."""


def derived_adapter(model: PreTrainedModel) -> Adapter:
    """Derive an adapter from a model, prove it on a tiny copy and on the model itself, and keep it for others.

    :raises AdapterError: with what could not be told apart, or with the law that does not hold and where.
    """
    if masks_of(model) is not None and model in _of_models:
        return _of_models[model]
    key = (type(model), _fingerprint(model.config))
    if key not in _known:
        try:
            with reading(model):
                adapter = TableAdapter((model.config.model_type,), family_for(derive(model), model.config), stored=True)
                _prove(model, adapter)
            _known[key] = adapter
        except CofipruneError as error:
            _known[key] = str(error)
    found = _known[key]
    if isinstance(found, str):
        raise AdapterError(
            f"no adapter for model type {model.config.model_type!r} ({type(model).__name__}), and none could be "
            f"derived: {found.rstrip('.')}. docs/reference/families.md lists the families that can be pruned, and "
            "docs/how-to/add-an-adapter.md shows how to describe another."
        )
    _of_models[model] = found
    return found


def _fingerprint(config: PretrainedConfig) -> str:
    """The settings that a model's modules depend on; a loss writes the kind of its labels into `problem_type`."""
    entries: dict[str, Any] = config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "problem_type"):
        entries.pop(name, None)
    return f"{sorted((name, repr(value)) for name, value in entries.items())} {config._attn_implementation}"


def _prove(model: PreTrainedModel, adapter: Adapter) -> None:
    """Compare masked and compacted outputs of the model itself, under masks over all units.

    :raises CofipruneError: when they differ, or when the table does not fit the model.
    """
    structure = adapter.structure(model)  # every row has to fit
    weights = next(model.parameters())
    if weights.is_meta:
        return
    generator = torch.Generator().manual_seed(2)
    subject = Subject(model, inputs(model, generator), structure)
    values = {group.name: random_values(group.size, generator, fractional=True) for group in structure.groups}
    failed = explained(AdapterError, "the model itself does not run with fewer units", RuntimeError, ValueError)
    with failed, subject.masked(values=values) as masks:
        masked, plan = subject.outputs(), masks.plan()
        difference = compared(masked, outputs(subject.compacted(plan), subject.batch), plan)
    if not difference <= _TOLERANCE.get(weights.dtype, _COARSE) * size(masked):
        raise AdapterError(
            f"on the model itself masked and compacted outputs differ by {difference:.2g}, although they agree on "
            "a small model of its kind."
        )


@dataclass(frozen=True)
class Derived:
    """A derived table and the expressions that give its sizes for a configuration."""

    family: Family
    settings: Settings


def family_for(derived: Derived, config: PretrainedConfig) -> Family:
    """Return the table for another configuration of the same kind, with its sizes."""
    queries = derived.settings.queries(config)

    def counted(axis: Axis) -> Axis:
        return axis.of(queries) if axis.block is not None and axis.block > 1 else axis

    table = derived.family.attention
    shared = tuple((module, name, counted(axis)) for module, name, axis in table.attributes)
    sizes = derived.settings.units(config)
    return replace(derived.family, sizes=sizes, attention=replace(table, attributes=shared))


def derive(model: PreTrainedModel) -> Derived:
    """Derive the table of a model's family on a tiny copy of it.

    :raises AdapterError: when it has no blocks that can be told apart or removed, saying what was found.
    """
    return _Derivation(*tiny_copy(model)).run(model)


@dataclass(frozen=True)
class _Part:
    """One block kind of the family: its draft in every layer, and how the blocks are bypassed."""

    kind: Kind
    drafts: list[Draft]
    others: list[Draft]
    bypasses: list[Bypass]

    def widths(self, firsts: Sequence[int]) -> list[int]:
        """What the last matrix reads in some layers."""
        return [self.drafts[index].writer.reads for index in firsts]


class _Derivation:
    """One derivation, on one tiny model."""

    def __init__(self, model: PreTrainedModel, batch: Batch) -> None:
        self.model = model
        self.batch = batch
        count = getattr(model.config, "num_hidden_layers", None)
        self.list = find_layers(model, count if isinstance(count, int) and not heads_of_stages(model.config) else None)
        self.base = encoder_path(model)
        if not inside(self.list, self.base):
            raise AdapterError(f"its layers {self.list!r} do not lie in its base model {self.base!r}")
        self.layers = members(dict(model.named_modules()), self.list)
        self.stages = stages_of(self.layers, self.list)
        self.attention, self.ffn = self._parts()
        self.width = self.attention.drafts[0].entries[0].shape[-1]
        firsts = [self.stages.index(stage) for stage in range(self.stages[-1] + 1)]
        widths, inner = (part.widths(firsts) for part in (self.attention, self.ffn))
        # Keys and values may be shared.
        narrow = min(widths[0], *(call.writes for call in self.attention.drafts[0].readers))
        self.settings = find_settings(model.config, self.width, widths, inner, narrow)

    def run(self, model: PreTrainedModel) -> Derived:
        """Return what holds for a model of this kind."""
        family = self._with_hidden(self._with_blocks())
        if found := self._problem(family, quick=False):
            raise AdapterError(found)
        if not self.stages[-1]:
            return Derived(family, self.settings)
        # No setting states the feed-forward dimensions of every stage.
        last = self.ffn.drafts[0].writer.path.removeprefix(self.layers[0])
        paths = members(dict(model.named_modules()), self.list)
        widths = {
            stage: weight_shape(model.get_submodule(path + last))[1]
            for path, stage in zip(paths, stages_of(paths, self.list), strict=True)
        }
        expressions = {**self.settings.expressions, "intermediate": repr(tuple(widths.values()))}
        return Derived(family, replace(self.settings, expressions=expressions))

    def _parts(self) -> tuple[_Part, _Part]:
        """Attention and feed-forward in every layer: the first block that mixes tokens is attention."""
        calls = self.calls = calls_of(self.model, self.batch)
        drafts, bypasses = [], []
        for layer in self.layers:
            blocks = find_blocks(calls, layer)
            found = find_bypasses(self.model, self.batch, calls, layer, blocks)
            if found is None:
                raise AdapterError(
                    f"in its layer {layer!r} no module was found through which the states leave unchanged when "
                    f"{blocks[0].writer.path!r} or {blocks[1].writer.path!r} writes nothing"
                )
            drafts.append(blocks)
            bypasses.append(found)
        writers = [block.writer.path for block in drafts[0]]
        mixing = [mixes(self.model, self.batch, self.layers[0], path) for path in writers]
        if not any(mixing):
            raise AdapterError(f"no block of its layer {self.layers[0]!r} lets tokens look at one another")
        first = mixing.index(True)
        # Not the last token: some models pad their inputs further.
        late = min(5, drafts[0][0].entries[0].shape[-2] - 1)
        looks_ahead = mixes(self.model, self.batch, self.layers[0], writers[first], token=late)
        if not looks_ahead and _generates(self.model):
            raise AdapterError(
                "each of its tokens sees those before it only, and its kind generates: it is a decoder, and cofiprune "
                "prunes encoders"
            )

        def part(kind: Kind, place: int) -> _Part:
            own, others = ([each[at] for each in drafts] for at in (place, 1 - place))
            return _Part(kind, own, others, [each[place] for each in bypasses])

        return part("heads", first), part("intermediate", 1 - first)

    def _with_blocks(self) -> Family:
        """The table with both blocks: of the choices that are left the first with which the law holds."""
        tables = {part.kind: next(self._choices(part)) for part in (self.attention, self.ffn)}
        refused: dict[str, str] = {}
        for part in (self.attention, self.ffn):
            problems = []
            for table in self._choices(part):
                family = self._family({**tables, part.kind: table}, {})
                problem = self._problem(family, (unit_of(part.kind),))
                if not problem:
                    tables[part.kind] = table
                    break
                problems.append(problem)
            else:
                refused[unit_of(part.kind)] = problems[0]
        return self._family(tables, refused)

    def _choices(self, part: _Part) -> Iterator[BlockTable]:
        sizes = self.settings.units(self.model.config)[part.kind]
        queries = self.settings.queries(self.model.config) if part.kind == "heads" else 1
        inner = []
        for draft, stage in zip(part.drafts, self.stages, strict=True):
            units = sizes[stage] if isinstance(sizes, tuple) else sizes
            inner.append(Inner(part.kind, units, units * queries, draft.writer.reads))
        fused = any(call.writes in (2 * inner[0].width, 3 * inner[0].width) for call in part.drafts[0].readers)
        for further, interleaved in itertools.product(self._further(part), (False, True)[: 1 + fused]):
            spelt = [replace(each, interleaved=interleaved) for each in inner]
            merged = _merged([self._table(part, index, each) for index, each in enumerate(spelt)], self.layers)
            layer = self.model.get_submodule(self.layers[-1])
            for choice in attributes(layer, self.layers[-1], part.drafts[-1], spelt[-1]):
                yield replace(merged, attributes=choice, **further)

    def _further(self, part: _Part) -> Iterator[dict[str, Any]]:
        """Yield what a block may have beside its modules, as arguments of its table."""
        yield {}
        units = self.settings.units(self.model.config)[part.kind]
        if part.kind == "heads" and isinstance(units, int):
            shared = find_shared(self.calls, self.layers, part.drafts[0], units)
            if shared is not None:
                yield {"shared": (shared,)}
        narrow = find_narrow(self.calls, self.layers[0], part.drafts[0]) if part.kind == "heads" else None
        if narrow is not None:
            yield {"narrow": narrow}

    def _table(self, part: _Part, index: int, inner: Inner) -> BlockTable:
        path, bypass = self.layers[index], part.bypasses[index]
        layer = self.model.get_submodule(path)
        draft = part.drafts[index]
        rows = block_rows(layer, path, draft, part.others[index], inner, self.width, bypass.held)
        if not bypass.exit.residual:  # what the norm behind the last matrix writes is what is added
            behind = {call.path.removeprefix(f"{path}.") for call in draft.norms if call.start > draft.writer.end}
            rows = tuple(replace(row, gated=row.gated or row.modules in behind) for row in rows)

        def local(exit: BlockExit) -> BlockExit:
            return replace(exit, module=exit.module.removeprefix(f"{path}."))

        bypassed = tuple(_short(local(each)) for each in bypass.bypassed)
        return BlockTable(rows=rows, exit=local(bypass.exit), bypassed=bypassed, dropped=bypass.held)

    def _family(self, tables: dict[Kind, BlockTable], refused: dict[str, str]) -> Family:
        return Family(
            sizes=self.settings.units(self.model.config),
            layers=self.list.removeprefix(self.base).lstrip("."),
            stem=(),
            attention=tables["heads"],
            ffn=tables["intermediate"],
            refused={"hidden": "the modules around the layers are not known yet", **refused},
        )

    def _with_hidden(self, family: Family) -> Family:
        """Add the modules around the layers, and allow hidden dimensions where the law then holds for them."""
        if self.stages[-1]:
            return replace(family, refused={**family.refused, "hidden": _STAGES})
        drafts = [*self.attention.drafts, *self.ffn.drafts]
        writers = [call.path for draft in drafts for call in (draft.writer, *draft.norms)]
        stem, head = find_surroundings(self.model, self.batch, self.layers, self.base, self.width, writers)
        refused = {unit: why for unit, why in family.refused.items() if unit != "hidden"}
        wide = replace(family, stem=stem, heads={type(self.model).__name__: head}, refused=refused)
        problem = self._problem(wide, ("hidden",))
        return replace(wide, refused={**refused, "hidden": problem}) if problem else wide

    def _problem(self, family: Family, units: tuple[UnitKind, ...] | None = None, *, quick: bool = True) -> str:
        """Return the first law that a table breaks, in the words of its error; "" when all hold.

        :param units: the choice of unit kinds to mask; None for all that the table allows, together.
        """
        adapter = TableAdapter((self.model.config.model_type,), family, stored=True)
        try:
            subject = Subject(self.model, self.batch, adapter.structure(self.model))
            present = {group.unit for group in subject.structure.groups}
            choice = tuple(unit for unit in UNIT_KINDS if unit in present) if units is None else units
            check_laws(subject, torch.Generator().manual_seed(1), [choice], quick=quick)
        except CofipruneError as error:
            return str(error)
        return ""


def _generates(model: PreTrainedModel) -> bool:
    """Tell whether the modelling file has a class that generates: some encoders of text look back only, too."""
    names = vars(sys.modules[type(model).__module__])
    return any(word in name for name in names for word in ("ForCausal", "LMHead"))


def _short(exit: BlockExit) -> str | BlockExit:
    return exit.module if exit == BlockExit(exit.module) else exit


def _merged(tables: Sequence[BlockTable], layers: Sequence[str]) -> BlockTable:
    """One table for all layers; rows that only some of them have are optional.

    :raises AdapterError: when blocks leave their layers in different ways.
    """
    last = tables[-1]
    for table, path in zip(tables, layers, strict=True):
        if table.exit != last.exit:
            raise AdapterError(
                f"its layers differ: a block leaves {layers[-1]!r} through {last.exit}, {path!r} through {table.exit}"
            )
    rows = {row.modules: row for table in (last, *reversed(tables)) for row in table.rows}
    everywhere = set.intersection(*({row.modules for row in table.rows} for table in tables))
    bypassed = dict.fromkeys(itertools.chain.from_iterable(table.bypassed for table in tables))
    merged = tuple(replace(row, optional=name not in everywhere) for name, row in rows.items())
    return replace(last, rows=merged, bypassed=tuple(bypassed))

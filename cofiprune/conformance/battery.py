"""The conformance battery: every law of the masks, for every head class of a family.

An adapter only describes, so that a wrong description does not fail where it is made: heads sliced at the wrong
rows still run and give other outputs. It shows in the law that a masked model and the compacted one agree, in float64
and with biases and norms that are not trivial, and in a few laws for what this one cannot see.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from cofiprune.adapter import Adapter, adapter_for, family_entries
from cofiprune.conformance import laws
from cofiprune.conformance.exits import check_blocks
from cofiprune.conformance.laws import ROUNDED, Case
from cofiprune.conformance.specimens import (
    Batch,
    Choice,
    Subject,
    head_classes,
    inputs,
    outputs,
    random_values,
    specimen,
    tiny_config,
    unit_choices,
)
from cofiprune.errors import AdapterError, LawError, StructureError, located
from cofiprune.refusals import has_decoder
from cofiprune.structure import UNIT_KINDS, Structure

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

EXACT = 1e-10
"""Largest difference allowed in float64, relative to the outputs: sums in another order differ by about 1e-15."""


@dataclass(frozen=True)
class Report:
    """Coverage of a battery that has passed."""

    families: tuple[str, ...]
    """The model types."""
    heads: tuple[str, ...]
    """Names of the head classes checked, once for each configuration."""
    choices: tuple[Choice, ...]
    """The choices of unit kinds."""
    cases: int
    """Number of sets of masks under which a model was compared with its compacted self."""
    largest_difference: float
    """Between the outputs of masked and compacted models, over every case."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Units that cannot be pruned and the reason, by `HeadClass: unit`."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Models that transformers itself could not build, run, or save and load, with its error."""

    def __str__(self) -> str:
        lines = [
            f"Every law holds for {', '.join(self.families)}.",
            f"  head classes        {len(self.heads)}: {', '.join(self.heads)}",
            f"  unit choices        {len(self.choices)}",
            f"  cases               {self.cases}",
            f"  largest difference  {self.largest_difference:.2g}",
        ]
        lines += [f"  refused             {name}: {reason}" for name, reason in self.refused.items()]
        lines += [f"  skipped             {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def check_adapter(
    adapter_or_model: Adapter | PreTrainedModel,
    *,
    heads: str | Iterable[str] | None = None,
    units: str | Iterable[str] | None = None,
    configs: Iterable[PretrainedConfig] | None = None,
    batch: Batch | None = None,
    seed: int = 0,
) -> Report:
    """Check every law of the masks and return what was covered.

    :param adapter_or_model: an adapter, which need not be registered, or one model of a family that has one. A
        model is copied and the copy's parameters are replaced by random ones, so that a small one is enough.
    :param heads: endings of the names of the head classes to check, such as "ForTokenClassification"; by default
        the bare encoder and all that the Auto classes of transformers have. Only with an adapter.
    :param units: one choice of unit kinds to check; by default all 15, less those that the model refuses.
    :param configs: small configurations to build models from; by default one for each of the adapter's model
        types, with every setting but the sizes as the family has it. Only with an adapter.
    :param batch: the inputs, for a model whose main input is not tokens, pixels or sound.
    :param seed: of parameters, inputs and masks.
    :raises LawError: at the first law that does not hold, naming the parameter or the module at fault.
    :raises AdapterError: when a description does not fit a model, or no head class could be checked.
    """
    battery = _Battery(seed, _choices(units), batch)
    with torch.random.fork_rng():
        if isinstance(adapter_or_model, Adapter):
            adapter = adapter_or_model
            if configs is None:
                configs = [tiny_config(name, **adapter.test_settings) for name in adapter.model_types]
            for config in configs:
                for cls in _head_classes(config, heads):
                    battery.build_and_check(cls, config, adapter)
        elif heads is not None or configs is not None:
            raise AdapterError("heads and configs choose models for an adapter; a model is checked as it is")
        else:
            battery.check(adapter_or_model, adapter_for(adapter_or_model))
    return battery.report()


def _choices(units: str | Iterable[str] | None) -> Sequence[Choice]:
    if units is None:
        return unit_choices()
    chosen = {units} if isinstance(units, str) else set(units)
    if not chosen or chosen - set(UNIT_KINDS):
        raise StructureError(f"units names {sorted(chosen)}; choose among {', '.join(UNIT_KINDS)}")
    return [tuple(unit for unit in UNIT_KINDS if unit in chosen)]


def _head_classes(config: PretrainedConfig, heads: str | Iterable[str] | None) -> Sequence[type[PreTrainedModel]]:
    classes = head_classes(config)
    if heads is None:
        return classes
    endings = (heads,) if isinstance(heads, str) else tuple(heads)
    for ending in endings:
        if not any(cls.__name__.endswith(ending) for cls in classes):
            names = ", ".join(cls.__name__ for cls in classes)
            raise AdapterError(f"no head class ends in {ending!r}; there are {names}")
    return [cls for cls in classes if cls.__name__.endswith(endings)]


@dataclass(frozen=True)
class _Battery:
    """Runs the laws model by model and collects what they cover."""

    seed: int
    choices: Sequence[Choice]
    batch: Batch | None
    structures: list[tuple[str, Structure]] = field(default_factory=list)
    """By name of the head class, once for each configuration."""
    differences: list[tuple[Case, float]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def build_and_check(self, cls: type[PreTrainedModel], config: PretrainedConfig, adapter: Adapter) -> None:
        """Check a model of a class; one that transformers itself cannot build or run is skipped."""
        try:
            model: PreTrainedModel = cls(copy.deepcopy(config))  # some classes change their configuration
            if has_decoder(model):
                self.skipped[cls.__name__] = "it has a decoder; cofiprune prunes encoders"
                return
            model.train(False)
            outputs(model, self._inputs(model))
        except AdapterError:
            raise
        except Exception as error:  # a head that does not fit the configuration
            self.skipped[cls.__name__] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            self.check(model, adapter)

    def _inputs(self, model: PreTrainedModel) -> Batch:
        if self.batch is None:
            return inputs(model, torch.Generator().manual_seed(self.seed))
        return {name: row.to(model.dtype) if row.is_floating_point() else row for name, row in self.batch.items()}

    def check(self, model: PreTrainedModel, adapter: Adapter) -> None:
        """Check every law on a copy of one model."""
        generator = torch.Generator().manual_seed(self.seed)
        name = type(model).__name__
        sample = specimen(model, generator)
        # The table goes along into files, so that an adapter need not be registered to load them.
        structure = replace(adapter.structure(sample), table=family_entries(adapter.describe(sample.config)))
        differences, unsaved = check_laws(Subject(sample, self._inputs(sample), structure), generator, self.choices)
        if unsaved:
            self.skipped[f"{name} from a file"] = unsaved
        self.structures.append((name, structure))
        self.differences.extend(differences)

    def report(self) -> Report:
        """Return what was covered.

        :raises AdapterError: when that is nothing.
        """
        refused = {f"{name}: {unit}": why for name, each in self.structures for unit, why in each.refused.items()}
        if not self.differences:
            why = "; ".join(f"{name}: {reason}" for name, reason in {**self.skipped, **refused}.items())
            raise AdapterError(f"nothing could be checked. {why}")
        return Report(
            families=tuple(dict.fromkeys(each.family for _, each in self.structures)),
            heads=tuple(name for name, _ in self.structures),
            choices=tuple(dict.fromkeys(case.choice for case, _ in self.differences)),
            cases=len(self.differences),
            largest_difference=max(difference for _, difference in self.differences),
            refused=refused,
            skipped=self.skipped,
        )


def check_laws(
    subject: Subject, generator: torch.Generator, choices: Collection[Choice], *, quick: bool = False
) -> tuple[list[tuple[Case, float]], str]:
    """Check every law on one model.

    :param generator: of the masks.
    :param choices: of unit kinds to mask.
    :param quick: compare masked and compacted models under random masks only.
    :return: each case with the difference between the masked and the compacted model, and why no model was saved and
        loaded; "" where that was possible.
    :raises LawError: at the first law that does not hold.
    """
    unsaved, differences = "", []
    kinds = len({group.unit for group in subject.structure.groups})
    with located(f"{type(subject.model).__name__} ({subject.structure.family}): ", LawError):
        laws.check_structure(subject)
        laws.check_applications(subject)
        tolerance = EXACT if laws.check_ones(subject) <= EXACT else ROUNDED
        if not quick:
            check_blocks(subject)
            unsaved = laws.unsaved(subject.model)
        for case in cases(subject.structure, generator):
            if case.choice in choices and (not quick or case.label.startswith("random")):
                reload = case.reload and not quick and not unsaved
                differences.append((case, laws.check_case(subject, case, tolerance, reload=reload)))
                if len(case.choice) == kinds and not quick:
                    laws.check_cut(subject, case)
        if not quick:
            laws.check_gradients(subject, generator)
    return differences, unsaved


def cases(structure: Structure, generator: torch.Generator) -> Iterator[Case]:
    """Yield random hard and fractional masks for every choice of unit kinds that a model has, and the extreme ones."""
    present = {group.unit for group in structure.groups}
    for choice in (choice for choice in unit_choices() if present.issuperset(choice)):
        everything = len(choice) == len(present)
        groups = structure.select(choice)
        for fractional in (False, True):
            values = {group.name: random_values(group.size, generator, fractional=fractional) for group in groups}
            yield Case(f"random {'fractional' if fractional else 'hard'} masks", choice, values, reload=everything)
        if everything or len(choice) == 1:
            yield from _extremes(structure, choice)


def _extremes(structure: Structure, choice: Choice) -> Iterator[Case]:
    groups = structure.select(choice)
    gates = {block.gate for block in structure.blocks[::3]}
    units = {str(block.inner) for block in structure.blocks[1::2]}
    for label, names in (
        ("blocks removed by their gates", gates),
        ("blocks removed by all of their units", units),
        ("every block removed", {group.name for group in groups} - {"hidden"}),
    ):
        zeros = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups if group.name in names}
        if zeros:
            yield Case(label, choice, zeros, reload=label.startswith("every"))
    last = {group.name: torch.eye(group.size, dtype=torch.float64)[-1] for group in groups if group.size > 1}
    if "hidden" in last:
        last["hidden"][-3:] = 1  # a norm over a single dimension returns its bias for every input
    if last:
        yield Case("one unit of each group left", choice, last)

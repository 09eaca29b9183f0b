"""What a description says, against the model as it is: groups, integers of modules, and how often layers run.

The laws of the masks are blind to some of this: counts of operations follow `applications`, and nothing else does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from cofiprune.conformance import exits
from cofiprune.conformance.laws import Subject
from cofiprune.conformance.trace import record
from cofiprune.conformance.wording import described, role_of
from cofiprune.errors import LawError


def check_structure(subject: Subject) -> None:
    """Every layer has its groups, in canonical order, and each of them has parameters.

    :raises LawError: with the first group that is missing, superfluous or out of place.
    """
    structure = subject.structure
    kinds = {"attention": "layer", "heads": "head", "ffn": "layer", "intermediate": "intermediate"}
    expected = [] if "hidden" in structure.refused else ["hidden"]
    for index in range(len(structure.layers)):
        expected += [f"layers.{index}.{kind}" for kind, unit in kinds.items() if unit not in structure.refused]
    if list(structure) != expected:
        pairs = zip([*structure, None], [*expected, None], strict=False)
        found, wanted = next(pair for pair in pairs if pair[0] != pair[1])
        raise LawError(f"{subject.who}: the structure has group {found!r} in the place of {wanted!r}")
    for name in structure:
        used = any(
            spec.gate == name or any(side is not None and side.group == name for side in spec.sides)
            for spec in structure.parameters
        )
        if not used:
            raise LawError(f"{subject.who}: no parameter has an axis of group {name!r}")
    problem = exits.uncovered(structure)
    if problem:
        raise LawError(f"{subject.who}: a removed block leaves nothing behind. {problem}")
    problem = wrong_attributes(subject)
    if problem:
        raise LawError(f"{subject.who}: attributes hold the sizes of the groups that they follow. {problem}")


def wrong_attributes(subject: Subject) -> str:
    """Name an attribute that is not there, or whose value is not the size that its axis gives it; "" when none is."""
    structure = subject.structure
    for attribute in structure.attributes:
        group = structure[attribute.group]
        size = group.size * attribute.per_unit
        value = getattr(subject.model.get_submodule(attribute.module), attribute.name, None)
        counts = attribute.per_unit == 1 or value in (None, group.size)
        if value != size and counts:  # how many elements a unit has is for the laws of the masks to say
            readers = [spec for spec in structure.parameters if spec.gated and role_of(spec, group.name)]
            return (
                f"{attribute.name!r} of {attribute.module!r} is {value}, and should be {size}: {group.name} has "
                f"{group.size} units, and {attribute.per_unit} is counted for each. Check the attribute's name and its "
                "axis (HEADS.of(1) counts heads, HEADS their elements), sizes, and the projection that says how many "
                f"elements a unit has: {described(readers)}."
            )
    return ""


def check_applications(subject: Subject, described: Sequence[int] | None) -> None:
    """Every layer runs as often as the description says.

    :param described: `Family.applications`.
    :raises LawError: naming the first layer that does not.
    """
    layers = subject.structure.layers
    calls = Counter(path for path, _ in record(subject.model, subject.batch))
    for path, times in zip(layers, described or (1,) * len(layers), strict=True):
        if calls[path] != times:
            raise LawError(
                f"{subject.who}: layer {path!r} runs {calls[path]} times in a forward pass, and `applications` says "
                f"{times}. It is ({', '.join(str(calls[each]) for each in layers)}) for these layers."
            )

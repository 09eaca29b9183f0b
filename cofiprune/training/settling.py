"""What a call of `prune` comes down to: method, units and targets within reach, and who teaches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cofiprune.adapter import structure as structure_of
from cofiprune.compaction.uniform_config import uniform_units
from cofiprune.data.mixed import Mixed
from cofiprune.data.prepare import cached_in, prepare
from cofiprune.data.reading import Reading
from cofiprune.data.streams import checked_stream
from cofiprune.errors import CheckpointError, CofipruneError, DataError, SettingsError, TargetError
from cofiprune.files import read_sealed, write_sealed
from cofiprune.hooks import same_random_state
from cofiprune.oneshot.with_data import calibration, check_one_shot
from cofiprune.selection.reachable import check_target
from cofiprune.selection.target import Target
from cofiprune.structure import Structure
from cofiprune.training.arguments import check_trainable, check_weights, target_for
from cofiprune.training.budget import Choice, check_method, choose, chosen_for_epochs, measure_pace
from cofiprune.training.config import PruneConfig
from cofiprune.training.run import Run
from cofiprune.training.width import check_keep_width
from cofiprune.whole import SENTENCES, Whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHOICE = "choice.json"


def data_of(
    whole: Whole, config: PruneConfig, reading: Reading, collator: Any, datasets: tuple[Any, Any, Any]
) -> tuple[Any, Any, Any]:
    """Return the rows of tokens to train and to evaluate on, and what makes batches of them.

    :param datasets: as in `prune`: for training, further ones without labels, for evaluations.
    :raises CofipruneError: when they cannot be read, or are no rows to train on.
    """
    train, unlabelled, held = datasets
    rows, held, collate = whole.data(reading, collator, train_dataset=Mixed.of(train, unlabelled), eval_dataset=held)
    return checked_stream(rows, trains=config.trains, steps=config.max_steps), held, collate


def taught_by(
    teacher: Any, whole: Whole, config: PruneConfig, rows: Any, collator: Any, *, keep_width: bool, picked: bool
) -> Any:
    """Return the teacher of `prune`: "self" where none was given and the run learns from its model as it comes.

    :param picked: method="auto" has picked gates.
    :raises SettingsError: for rows without labels among others that nobody teaches, and for two teachers.
    """
    cached = cached_in(rows)
    if keep_width and cached:
        raise SettingsError(f"keep_width=True needs a teacher's own vectors: leave {', '.join(cached)} out of the rows")
    alone = teacher is None and rows is not None and not cached
    if alone and (keep_width or _learns_alone(whole, config, rows, collator, picked=picked)):
        teacher = "self"
    if config.trains:
        check_taught(rows, teacher, cached)
    return teacher


def check_taught(rows: Any, teacher: Any, cached: Sequence[str]) -> None:
    """Make sure that rows without labels, mixed into others, have a teacher, and that there is one at most.

    :param cached: columns of the rows with a teacher's outputs.
    :raises SettingsError: when they have none, or one is passed while rows have the outputs of another.
    """
    if cached and teacher is not None:
        raise SettingsError(
            f"the rows of train_dataset have {', '.join(cached)}, which take the place of a teacher, and there is one: "
            "leave the teacher out, or those columns"
        )
    if isinstance(rows, Mixed) and teacher is None and not cached:
        raise SettingsError(
            "unlabelled_dataset: of rows without labels only a teacher's outputs can be learned, and there is none: "
            'pass teacher="self", or a model'
        )


def _learns_alone(whole: Whole, config: PruneConfig, rows: Any, collator: Any, *, picked: bool) -> bool:
    """Return whether a run without a teacher learns from its model as it comes, as all do that can, without labels."""
    if whole.kind == SENTENCES:
        return config.trains
    if config.method == "auto" or picked:
        with same_random_state():  # a collator may draw
            found = prepare(rows, whole.model, batch_size=1, collator=collator, need_labels=False, name="train_dataset")
        return not found.labelled
    return config.teaches_itself


def settled(
    whole: Whole, config: PruneConfig, name: str, asked: float | list[float], *, on_data: bool, keep_width: bool
) -> tuple[Structure, PruneConfig, list[Target], str]:
    """Check the method and the targets against the model.

    :param name: of the argument that asks for the targets.
    """
    if isinstance(asked, list) and config.uniform:
        raise SettingsError("uniform=True takes one target: what it leaves is another model, not a part of this one")
    model = whole.model
    if keep_width:
        check_keep_width(whole, asked, has_data=on_data)
    structure = structure_of(model)
    check_weights(model)
    check_method(config, has_data=on_data)
    values = {name: asked if isinstance(asked, list) else [asked]}
    config = config.model_copy(update=whole.settings)
    return structure, *_settle(config, whole, structure, values, on_data=on_data)


def _settle(
    config: PruneConfig, whole: Whole, structure: Structure, asked: dict[str, list[float]], *, on_data: bool
) -> tuple[PruneConfig, list[Target], str]:
    """Settle what structure and target decide: units, and gates where method="auto" has to leave a target to them.

    :param asked: the targets' values, by their name.
    :return: the configuration, the targets, all of them within reach, and why gates were picked if they were.
    :raises CofipruneError: for kinds that the model does not have, and targets that are out of reach.
    """
    ((name, values),) = asked.items()
    reason = ""
    if on_data and config.method == "auto" and config.gate_settings:
        config, reason = config.model_copy(update={"method": "cofi"}), f"cofi: {config.gate_settings[0]} is of gates"
    found = _for_model(config, whole.model, structure)
    targets = [target_for(whole.model, structure, found, name, value) for value in values]
    try:
        _check_reachable(whole, structure, targets, found, on_data=on_data)
    except TargetError as error:
        if not on_data or config.method != "auto" or config.time_budget is not None:
            raise
        gated = config.model_copy(update={"method": "cofi"})
        return *_settle(gated, whole, structure, asked, on_data=True)[:2], f"cofi: one shot cannot do it, {error}"
    return found, targets, reason


def _check_reachable(
    whole: Whole, structure: Structure, targets: Sequence[Target], config: PruneConfig, *, on_data: bool
) -> None:
    """Make sure that the structure allows every target, with the kinds of units that may go.

    :raises CofipruneError: for kinds that the model does not have, targets that are out of reach, and kinds that
        something behind the model needs.
    """
    structure.select(config.one_shot_units)
    one_shot = on_data and config.decides_in_one_shot
    units = config.one_shot_units or config.units if one_shot else config.units
    if any(group.kind == "hidden" for group in structure.select(units)) and not (one_shot and units is None):
        whole.check_width()
    for target in targets:
        (check_one_shot if one_shot else check_target)(structure, target, units)


def _for_model(config: PruneConfig, model: PreTrainedModel, structure: Structure) -> PruneConfig:
    """Name the unit kinds of uniform layers: those that the model's configuration can state."""
    if not config.uniform:
        return config
    units = uniform_units(model, structure, config.units)
    if config.units is None and config.decides_in_one_shot:
        units = tuple(unit for unit in units if unit != "hidden")  # in one shot they go only where they are named
    return PruneConfig.create(config, units=units)


def pick_method(run: Run, target: Target) -> None:
    """Pick a method and epochs by the budget, and go by it: `method="auto"`.

    :raises SettingsError: when the budget is too small for anything.
    :raises DataError: when rows are too few for it, or for uniform layers.
    """
    config = run.config
    saved = None if run.folder is None else run.folder / _CHOICE
    if run.resume and saved is not None and saved.exists():
        choice = Choice(**read_sealed(saved, CheckpointError, f"{saved} is damaged; start afresh in another folder"))
    elif (problem := _too_few_rows(run)) is not None:
        return leave_to_gates(run, config, problem)
    elif config.time_budget is None:
        choice = chosen_for_epochs(config)
    else:
        batches, steps = run.batches, run.steps_in(run.batches)
        pace = measure_pace(run.model, run.structure, run.teacher, batches, steps_per_epoch=steps, target=target.share)
        choice = choose(pace, config.time_budget, share=1 - target.share)
    _go_by(run, config, choice)


def leave_to_gates(run: Run, config: PruneConfig, problem: CofipruneError) -> None:
    """Go by gates, because one shot turned out not to do what method="auto" picked it for.

    :param config: from before it was picked.
    :param problem: of one shot; raised where gates are no way out.
    """
    if config.method != "auto" or config.time_budget is not None or config.uniform:
        raise problem
    _go_by(run, config, Choice(0.0, f"cofi: one shot cannot do it, {problem}", "cofi"))


def _go_by(run: Run, config: PruneConfig, choice: Choice) -> None:
    if run.folder is not None and run.accelerator.is_main_process:
        write_sealed(run.folder / _CHOICE, asdict(choice))
    run.config = config.model_copy(update=choice.settings(config))
    check_trainable(run.model, gated=choice.method == "cofi")
    run.settle()
    run.reason = choice.reason


def _too_few_rows(run: Run) -> DataError | None:
    try:
        calibration(run.model, run.structure, run.calibration)
    except DataError as error:
        return error
    return None


# Before and after.

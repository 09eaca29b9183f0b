"""`prune` and `finetune`: what can be checked is checked, then a `Run` does the work."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cofiprune.adapter import structure as structure_of
from cofiprune.errors import SettingsError
from cofiprune.evaluation import evaluating
from cofiprune.masking import attach, masks_of
from cofiprune.oneshot import prune_without_data
from cofiprune.oneshot.sequential import check_one_shot
from cofiprune.selection import check_target
from cofiprune.target import Target
from cofiprune.training.checks import check_output_dir, check_trainable, check_weights, resolve_teacher, take_masks_off
from cofiprune.training.config import PruneConfig
from cofiprune.training.loop import Callback
from cofiprune.training.phases import Run, held_out
from cofiprune.training.result import PruneResult, reached
from cofiprune.training.targets import target_for, the_one

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    TeacherArgument = PreTrainedModel | Literal["self"] | None


def prune(
    model: PreTrainedModel,
    train_dataset: Any = None,
    *,
    target_sparsity: float | None = None,
    target_model_sparsity: float | None = None,
    target_macs: float | None = None,
    teacher: TeacherArgument = None,
    eval_dataset: Any = None,
    data_collator: Callable[[list[Any]], Any] | None = None,
    compute_metrics: Callable[[Any], dict[str, float]] | None = None,
    config: PruneConfig | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> PruneResult:
    """Prune an encoder to a target, in place: weights are trained and the final masks stay attached.

    With data this is CoFi (Xia et al., 2022, arXiv:2204.00408): hard-concrete gates over heads, feed-forward
    dimensions, hidden dimensions and whole blocks learn under a sparsity constraint, with distillation from the
    teacher; the structure is then fixed at exactly the target, and the weights that are left recover. Without data
    it is a one-shot prune from the weights, repaired against the teacher's answers on synthetic inputs.

    Masks of an earlier run are taken off first, with a warning: it starts from all of the model. To go on from what
    an earlier run left, prune `cofiprune.compact(model)`.

    :param model: any transformers encoder with an adapter, with any head.
    :param train_dataset: a torch or `datasets` Dataset, a list of dicts, or a DataLoader; None for one shot
        without data.
    :param target_sparsity: share of the parameters of the encoder's layers to remove, in (0, 1); met within 0.005.
        0.9 when no other target is given; there is one target at most.
    :param target_model_sparsity: the same of every parameter of the model, embedding tables included.
    :param target_macs: multiply-accumulates of the whole model that may be left, for one example of
        `target_seq_len` tokens, as `summary` counts them; met within 0.005 of the dense model's.
    :param teacher: a model to learn from, "self" for a frozen copy of `model` as it comes, None for labels alone.
    :param eval_dataset: evaluated every `eval_steps` and at the end.
    :param compute_metrics: takes a `transformers.EvalPrediction`, returns figures by name.
    :param output_dir: where checkpoints and the plan go.
    :param resume: go on from the newest checkpoint in `output_dir`.
    :param callbacks: functions that are called with each entry of the history.
    :param settings: fields of `PruneConfig`, on top of `config`.
    :raises CofipruneError: for wrong arguments, before anything is changed.
    :raises KeyboardInterrupt: on Ctrl-C, after a checkpoint has been written when there is an `output_dir`.
    """
    config = PruneConfig.create(config, **settings)
    asked = {
        "target_sparsity": target_sparsity,
        "target_model_sparsity": target_model_sparsity,
        "target_macs": target_macs,
    }
    the_one(asked)
    structure = structure_of(model)
    check_weights(model)
    target = target_for(model, structure, config, asked)
    on_data = train_dataset is not None and config.method == "one-shot"
    check = check_one_shot if on_data else check_target
    check(structure, target, config.units)
    taught = resolve_teacher(teacher, model)
    copied = None if taught is None or teacher is taught else masks_of(taught)
    if copied is not None:
        copied.detach()  # of the run that is resumed; its checkpoint has the teacher's weights
    if train_dataset is None:
        if resume:
            raise SettingsError("resume=True goes on with a run over data; without a train_dataset there is none")
        folder = check_output_dir(output_dir, resume=False)
        measured = held_out(eval_dataset, model, config, data_collator, compute_metrics)
        take_masks_off(model, stacklevel=3)
        result = _prune_without_data(model, target, taught, config)
        if measured is not None:
            result.metrics = measured(model)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            result.plan.save(folder / "plan.json")
        return result
    if on_data:
        if resume:
            raise SettingsError("resume=True goes on with training, and one shot trains nothing: call it again")
    else:
        check_trainable(model, gated=True)
    run = Run(
        model,
        taught,
        config,
        train_dataset,
        eval_dataset,
        data_collator,
        compute_metrics,
        output_dir,
        callbacks,
        resume=resume,
        teaches_itself=teacher == "self",
    )
    return run.one_shot(target) if on_data else run.prune(target)


def finetune(
    model: PreTrainedModel,
    train_dataset: Any,
    *,
    teacher: TeacherArgument = None,
    eval_dataset: Any = None,
    data_collator: Callable[[list[Any]], Any] | None = None,
    compute_metrics: Callable[[Any], dict[str, float]] | None = None,
    config: PruneConfig | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> PruneResult:
    """Train a model in place, with or without a teacher: dense, compacted, or with masks attached.

    With masks attached, what they keep is trained and they stay as they are. The arguments are those of `prune`;
    `epochs` and `learning_rate`, when given, mean those of this training and go before `finetune_epochs` and
    `finetune_learning_rate`.

    :raises CofipruneError: for wrong arguments, before anything is changed.
    """
    for plain in ("epochs", "learning_rate", "lr_scheduler_type"):
        if plain in settings:
            settings[f"finetune_{plain}"] = settings.pop(plain)
    config = PruneConfig.create(config, **settings)
    structure_of(model)
    check_weights(model)
    check_trainable(model, gated=False)
    taught = resolve_teacher(teacher, model)
    if train_dataset is None:
        raise SettingsError("finetune needs a train_dataset; prune(model) without data is the one-shot method")
    run = Run(
        model,
        taught,
        config,
        train_dataset,
        eval_dataset,
        data_collator,
        compute_metrics,
        output_dir,
        callbacks,
        resume=resume,
        teaches_itself=teacher == "self",
    )
    return run.finetune()


def _prune_without_data(
    model: PreTrainedModel, target: Target, teacher: PreTrainedModel | None, config: PruneConfig
) -> PruneResult:
    source = "the weights alone" if teacher is None else "the weights and the teacher's answers on synthetic inputs"
    kept = "0.83, 0.69 and 0.51" if teacher is None else "0.85, 0.81 and 0.75"
    warnings.warn(
        f"pruning without data, from {source}. What to expect: a MiniLM-L6 with 0.872 on SST-2 keeps {kept} at "
        "sparsities of 0.2, 0.5 and 0.9. A few thousand rows of the task and a teacher bring most of the rest back, "
        "labelled or not: prune(model, train_dataset, teacher=...).",
        UserWarning,
        stacklevel=3,
    )
    with nullcontext() if teacher is None else evaluating(teacher):
        report = prune_without_data(
            model, target_sparsity=target, teacher=teacher, units=config.units, seed=config.seed
        )
    masks = attach(model)
    masks.set_plan(report.plan)
    found = reached(target, masks.structure, report.plan)
    return PruneResult(model, report.plan, masks.sparsity(), masks.model_sparsity(), target=found)

"""`prune` and `finetune`: what can be checked is checked, then a `Run` does the work."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from cofiprune.adapter import structure as structure_of
from cofiprune.data.prepare import cached_in
from cofiprune.data.reading import Reading
from cofiprune.errors import SettingsError, TargetError
from cofiprune.hooks import same_random_state
from cofiprune.masking import attach_to
from cofiprune.oneshot.data_free import prune_data_free
from cofiprune.selection.target import Target, parse_target
from cofiprune.training.arguments import check_trainable, check_weights, resolve_teacher, take_masks_off
from cofiprune.training.checkpoint import Resume
from cofiprune.training.config import FINETUNE, PruneConfig, check_taken
from cofiprune.training.environment import accelerator_for, check_output_dir, held_out
from cofiprune.training.phases import finished, prune_with_data, train_kept
from cofiprune.training.resolved import Facts, resolve, unit_kinds
from cofiprune.training.result import PruneResult, figures_around, reached
from cofiprune.training.run import Callback, Run
from cofiprune.training.settings import check_names
from cofiprune.training.settling import check_taught, data_of, leave_to_gates, pick_method, settled, taught_by
from cofiprune.training.sweep import SweepResult, sweep
from cofiprune.training.width import widen
from cofiprune.whole import Whole, inside

if TYPE_CHECKING:
    TeacherArgument = Any  # a transformers model, an object of sentence-transformers around one, "self" or None


@overload
def prune(
    model: Any, train_dataset: Any = None, *, target_sparsity: Sequence[float], **settings: Any
) -> SweepResult: ...
@overload
def prune(
    model: Any, train_dataset: Any = None, *, target_sparsity: float | None = None, **settings: Any
) -> PruneResult: ...
def prune(  # noqa: PLR0913  # the front door: its settings are flat
    model: Any,
    train_dataset: Any = None,
    *,
    target_sparsity: float | Sequence[float] | None = None,
    target_model_sparsity: float | None = None,
    target_macs: float | None = None,
    target_file_mb: float | None = None,
    target_speedup: float | None = None,
    target_latency_ms: float | None = None,
    teacher: TeacherArgument = None,
    unlabelled_dataset: Any = None,
    eval_dataset: Any = None,
    tokenizer: Any = None,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    label_names: Sequence[str] | None = None,
    max_length: int | None = None,
    data_collator: Callable[[list[Any]], Any] | None = None,
    compute_metrics: Callable[[Any], dict[str, float]] | None = None,
    config: PruneConfig | None = None,
    output_dir: str | Path | None = None,
    resume: Resume = False,
    callbacks: Sequence[Callback] = (),
    keep_width: bool = False,
    **settings: Any,
) -> PruneResult | SweepResult:
    """Prune an encoder to a target, in place: weights are trained and the final masks stay attached.

    With data, one shot decides in a few rounds of measuring, cutting and reconstructing, and what is left recovers by
    distillation from the teacher. With method="cofi" (Xia et al., 2022, arXiv:2204.00408) hard-concrete gates over
    heads, feed-forward dimensions, hidden dimensions and whole blocks learn under a sparsity constraint; the structure
    is then fixed at exactly the target, and the weights that are left recover. Without data it is a one-shot prune
    from the weights, reconstructed against the teacher's outputs on synthetic inputs.

    Masks of an earlier run are taken off first, with a warning: it starts from all of the model. To go on from what
    an earlier run left, prune `cofiprune.compact(model)`.

    :param model: any transformers encoder with an adapter, with any head; or a `SentenceTransformer` or `CrossEncoder`
        around one, which then is what the result holds, and what its `compact()` returns.
    :param train_dataset: rows as dicts, of text (with a `tokenizer`) or of tokens: a list, a torch or `datasets`
        Dataset, the name of a file, or an IterableDataset with `max_steps`; or a DataLoader. None for one shot without
        data. For an object of sentence-transformers, strings or pairs of them will do.
    :param target_sparsity: share of the parameters of the encoder's layers to remove, in (0, 1); met within 0.005.
        0.9 when no other target is given; there is one target at most. Several in a list give a `SweepResult`: each
        starts from what the one before has left, and goes to its own folder in `output_dir`.
    :param target_model_sparsity: the same of every parameter of the model, embedding tables included.
    :param target_macs: multiply-accumulates of the model that may be left, for one example of
        `target_seq_len` tokens, as `summary` counts them; met within 0.005 of the dense model's.
    :param target_file_mb: MB (10^6 bytes) that the compacted model's `model.safetensors` may have in
        `target_file_dtype`, embedding tables included; it ends within 2 % of that, and never above.
    :param target_speedup: the dense model's time over the pruned one's, above 1, measured on the device that the model
        is on, at `target_batch_size` and `target_seq_len`; the compacted model is measured, and corrected.
    :param target_latency_ms: milliseconds per batch of that size, likewise.
    :param teacher: a model to learn from, "self" for a frozen copy of `model` as it comes, None for labels alone; None
        is "self" for rows without labels, and with methods that do not look at them ("gates", and "one-shot" with
        recovery).
    :param unlabelled_dataset: further rows, in any form that `train_dataset` may have but a DataLoader, that are mixed
        into it; texts in a list will do. Of them the teacher's outputs alone are learned, whatever labels they have.
    :param eval_dataset: evaluated every `eval_steps` and at the end.
    :param tokenizer: the model's, for rows of text. Columns are known by the names that GLUE, SQuAD, CoNLL and the like
        give them: a text, a pair, words with a label each, a question with its passage and answers.
    :param text_column: the text, or the first one of a pair, by another name; `text_pair_column` the second one.
    :param label_column: the label by another name: the name of a class of the model's, its number, or a number.
    :param label_names: the classes in the order of their ids, for a model whose configuration does not name them.
    :param max_length: tokens after which a text is cut; 128 by default, 384 with passages.
    :param compute_metrics: takes a `transformers.EvalPrediction`, returns figures by name.
    :param output_dir: where checkpoints and the plan go.
    :param resume: True to go on from the newest checkpoint in `output_dir`, "auto" to do so where there is one and to
        start afresh where there is none.
    :param callbacks: functions that are called with each entry of the history.
    :param keep_width: of a `SentenceTransformer`: where hidden dimensions go, append a `Dense` module that maps the
        vectors back to the teacher's, fitted on the training texts, so that an index of the teacher's stays valid.
    :param settings: fields of `PruneConfig`, on top of `config`.
    :raises CofipruneError: for wrong arguments, before anything is changed.
    :raises KeyboardInterrupt: on Ctrl-C, after a checkpoint has been written when there is an `output_dir`.
    """
    with torch.inference_mode(False), same_random_state():  # a run has gradients, and is seeded by its own setting
        config = _config(config, settings)
        name, asked = parse_target({
            "target_sparsity": target_sparsity, "target_model_sparsity": target_model_sparsity,
            "target_macs": target_macs, "target_file_mb": target_file_mb,
            "target_speedup": target_speedup, "target_latency_ms": target_latency_ms,
        })  # fmt: skip
        whole, on_data = Whole.of(model), train_dataset is not None
        structure, config, targets, reason = settled(whole, config, name, asked, on_data=on_data, keep_width=keep_width)
        reading = Reading(tokenizer, text_column, text_pair_column, label_column, label_names, max_length)
        datasets = (train_dataset, unlabelled_dataset, eval_dataset)
        rows, held, collate = data_of(whole, config, reading, data_collator, datasets)
        teacher = taught_by(teacher, whole, config, rows, collate, keep_width=keep_width, picked=bool(reason))
        run = Run(
            whole.model, structure, config, targets[0],
            resolve_teacher(inside(teacher), whole.model, of_dense=True), teacher == "self",
            rows, held, collate, compute_metrics, output_dir, callbacks, resume, reason,
        )  # fmt: skip
        if isinstance(asked, list):
            return sweep(run, targets, _prune, whole.tokenizer if tokenizer is None else tokenizer).around(whole)
        return _prune_whole(run, whole, teacher, keep_width=keep_width).of(tokenizer, train_dataset)


def _config(config: PruneConfig | None, settings: dict[str, Any]) -> PruneConfig:
    check_names(settings, PruneConfig.model_fields, prune)
    return PruneConfig.create(config, **settings)


def _prune_whole(run: Run, whole: Whole, teacher: Any, *, keep_width: bool) -> PruneResult:
    """Prune the model inside of what was passed in, and give that back."""
    result = _prune(run)
    if keep_width:
        widen(whole, whole.like(teacher, run.teacher), run.calibration)
    result.model = whole.owner
    return result


def _prune(run: Run) -> PruneResult:
    """Prune one model to one target."""
    config, target = run.config, run.target
    assert target is not None
    if run.train_dataset is None:
        return _prune_data_free(run, target)
    if config.trains:
        check_trainable(run.model, gated=not config.decides_in_one_shot)
    elif run.resume is True:
        raise SettingsError("resume=True goes on with training, and one shot trains nothing: call it again")
    run.prepare()
    if config.method == "auto":
        pick_method(run, target)
    try:
        prune_with_data(run, target)
    except TargetError as problem:
        leave_to_gates(run, config, problem)
        prune_with_data(run, target)
    return finished(run)


def _prune_data_free(run: Run, target: Target) -> PruneResult:
    """Prune in one shot without data."""
    model, teacher, config = run.model, run.teacher, run.config
    if run.resume is True:
        raise SettingsError("resume=True goes on with a run over data; without a train_dataset there is none")
    folder, first = check_output_dir(run.output_dir, resume=False), accelerator_for(config).is_main_process
    evaluate = held_out(model, run.eval_dataset, config, run.collator, run.compute_metrics)
    take_masks_off(model, stacklevel=5)
    source = "the weights alone" if teacher is None else "the weights and the teacher's outputs on synthetic inputs"
    kept = "0.82, 0.73 and 0.54" if teacher is None else "0.85, 0.80 and 0.73"
    warnings.warn(
        f"pruning without data, from {source}. What to expect: a MiniLM-L6 with 0.862 on SST-2 keeps {kept} at "
        "sparsities of 0.2, 0.5 and 0.9. A few thousand rows of the task and a teacher bring most of the rest back, "
        "labelled or not: prune(model, train_dataset, teacher=...).",
        UserWarning,
        stacklevel=4,
    )
    facts = Facts(1, target=target.share, round_to=target.round_to, units=unit_kinds(run.structure))
    settings = resolve(PruneConfig.create(config, method="one-shot"), facts)
    scores = {} if evaluate is None else evaluate(model)
    plan = prune_data_free(
        model, run.structure, target,
        teacher=teacher, units=settings.units, seed=settings.seed, reconstruct=settings.repair is not False,
    )  # fmt: skip
    masks = attach_to(model, run.structure)
    masks.set_plan(plan)
    result = PruneResult(
        model,
        plan,
        masks.sparsity(),
        masks.model_sparsity(),
        method="no data",
        target=reached(target, model, run.structure, plan),
        settings=settings,
    )
    if evaluate is not None:
        result.metrics = evaluate(model)
    result.dense, result.pruned = figures_around(model, run.structure, plan, settings, scores, result.metrics)
    if folder is not None and first:
        result.plan.save(folder / "plan.json")
    return result


def finetune(  # noqa: PLR0913  # like prune
    model: Any,
    train_dataset: Any,
    *,
    teacher: TeacherArgument = None,
    unlabelled_dataset: Any = None,
    eval_dataset: Any = None,
    tokenizer: Any = None,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    label_names: Sequence[str] | None = None,
    max_length: int | None = None,
    data_collator: Callable[[list[Any]], Any] | None = None,
    compute_metrics: Callable[[Any], dict[str, float]] | None = None,
    config: PruneConfig | None = None,
    output_dir: str | Path | None = None,
    resume: Resume = False,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> PruneResult:
    """Train a model in place, with or without a teacher: dense, compacted, or with masks attached.

    With masks attached, what they keep is trained and they stay as they are. The arguments are those of `prune`;
    `epochs`, `learning_rate`, `lr_scheduler_type` and `batch_size`, when given, mean those of this training and go
    before `finetune_epochs` and the like; in a `config` they count where `finetune_epochs` and the like are left open.

    :raises CofipruneError: for wrong arguments, before anything is changed.
    """
    with torch.inference_mode(False), same_random_state():
        check_taken("finetune", settings, FINETUNE, function=finetune)
        whole = Whole.of(model)
        config = PruneConfig.for_finetune(config, **settings).model_copy(update=whole.settings)
        structure = structure_of(whole.model)
        check_weights(whole.model)
        check_trainable(whole.model, gated=False)
        taught = resolve_teacher(inside(teacher), whole.model)
        if train_dataset is None:
            raise SettingsError("finetune needs a train_dataset; prune(model) without data is the one-shot method")
        reading = Reading(tokenizer, text_column, text_pair_column, label_column, label_names, max_length)
        datasets = (train_dataset, unlabelled_dataset, eval_dataset)
        rows, held, collate = data_of(whole, config, reading, data_collator, datasets)
        check_taught(rows, teacher, cached_in(rows))
        run = Run(
            whole.model, structure, config, None, taught, teacher == "self",
            rows, held, collate, compute_metrics, output_dir, callbacks, resume,
        )  # fmt: skip
        run.prepare()
        train_kept(run)
        result = finished(run)
        result.model = whole.owner
        return result.of(tokenizer, train_dataset)

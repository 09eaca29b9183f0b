"""What a pruning callback cannot work with, said before anything is changed."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from accelerate.state import AcceleratorState

from cofiprune.errors import SettingsError
from cofiprune.training.config import PruneConfig

if TYPE_CHECKING:
    from torch import nn

_OF_THE_TRAINER = {
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "finetune_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "lr_scheduler_type": "lr_scheduler_type",
    "warmup_ratio": "warmup_steps",
    "mixed_precision": "bf16",
    "logging_steps": "logging_steps",
    "eval_steps": "eval_steps",
    "checkpoint_steps": "save_steps",
    "metric_for_best_model": "metric_for_best_model",
    "greater_is_better": "greater_is_better",
    "progress": "disable_tqdm",
}
"""Settings that the Trainer's arguments decide, and what they are called there."""
_OF_NOBODY = {
    "finetune_epochs": "what is left can be trained on with cofiprune.finetune(model, ...) afterwards",
    "finetune_learning_rate": "the Trainer's learning_rate holds to the end",
    "finetune_lr_scheduler_type": "the Trainer's lr_scheduler_type holds to the end",
    "method": 'a Trainer trains; prune(model, train_dataset, method="one-shot") does not',
    "uniform": "a callback gives every block a shape of its own",
    "target_seq_len": "a callback takes a sparsity",
    "target_batch_size": "a callback takes a sparsity",
    "latency_cache": "a callback takes a sparsity",
    "repair": "the Trainer trains what the gates leave",
    "time_budget": "the Trainer's num_train_epochs or max_steps says how long it trains",
    "train_embeddings": "switch requires_grad of the embeddings off before the Trainer is made",
    "teacher_memory_mb": "the teacher is asked anew for every batch, because the Trainer does not number its rows",
}


def callback_config(config: PruneConfig | None, settings: dict[str, Any]) -> PruneConfig:
    """Make the configuration of a callback.

    :raises SettingsError: for a setting that the Trainer decides, beside the errors of `PruneConfig`.
    """
    for name in settings:
        if name in _OF_THE_TRAINER:
            raise SettingsError(
                f"PruningCallback does not take {name!r}: the Trainer decides it, with "
                f"TrainingArguments({_OF_THE_TRAINER[name]}=...)"
            )
        if name in _OF_NOBODY:
            raise SettingsError(f"PruningCallback does not take {name!r}: {_OF_NOBODY[name]}")
    made = PruneConfig.create(config, **settings)
    unused = sorted(name for name in made.model_fields_set if name in _OF_THE_TRAINER or name in _OF_NOBODY)
    if unused:
        warnings.warn(
            f"not used of the config, because the Trainer's arguments decide it: {', '.join(unused)}",
            UserWarning,
            stacklevel=3,
        )
    return made


def used_settings(config: PruneConfig) -> dict[str, Any]:
    """The settings that a callback goes by, as plain values."""
    values = config.model_dump(exclude={*_OF_THE_TRAINER, *_OF_NOBODY})
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def check_arguments(args: Any, state: Any, model: nn.Module, *, taught: bool) -> None:
    """Make sure that the Trainer runs in a way that gates can follow.

    :param args: the Trainer's `TrainingArguments`, `state` its `TrainerState`.
    :raises SettingsError: naming the first argument that they cannot.
    """
    kind = str(AcceleratorState().distributed_type.value)
    checkpointing = getattr(args, "activation_checkpointing", None) or getattr(args, "gradient_checkpointing", False)
    finds_unused = args.ddp_find_unused_parameters
    if finds_unused is None:
        finds_unused = not checkpointing
    if args.n_gpu > 1:
        raise SettingsError(
            f"the Trainer would run on {args.n_gpu} GPUs from one process (DataParallel), whose copies of the model "
            "have no gates; start it with torchrun, or show it one GPU with CUDA_VISIBLE_DEVICES"
        )
    whole = kind == "NO" or kind.startswith("MULTI_")
    if not whole or any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise SettingsError(
            f"gates cannot be learned where the model is cut into shards ({kind}); use one process, or several that "
            "each hold all of it (DistributedDataParallel)"
        )
    if args.torch_compile:
        raise SettingsError(
            "torch_compile=True would freeze the first sample of the gates into the model; leave it out"
        )
    if args.world_size > 1 and not finds_unused:
        raise SettingsError(
            "blocks that are removed get no gradient, which DistributedDataParallel takes for an error unless "
            "TrainingArguments(ddp_find_unused_parameters=True); with gradient checkpointing it has to be said"
        )
    if state.is_hyper_param_search:
        raise SettingsError("PruningCallback has no part in hyperparameter_search; call train() for each choice")
    if taught and args.label_smoothing_factor:
        raise SettingsError(
            "with label_smoothing_factor the loss is computed outside of the model, where the teacher's part cannot be "
            "added; leave it out, the teacher's answers are smooth labels already"
        )

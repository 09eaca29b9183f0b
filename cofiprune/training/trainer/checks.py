"""Checks of a pruning callback's settings and of the Trainer's arguments, before anything is changed."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainingArguments

from cofiprune.data.batches import LARGE, Batches
from cofiprune.data.prepare import prepare
from cofiprune.errors import SettingsError
from cofiprune.oneshot.with_data import can_start
from cofiprune.structure import Structure
from cofiprune.training.config import CALLBACK, PruneConfig, check_taken, names_of
from cofiprune.training.processes import check_processes
from cofiprune.training.settings import TRAINER_NAMES

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def callback_config(config: PruneConfig | None, settings: dict[str, Any]) -> PruneConfig:
    """Make the configuration of a callback.

    :raises SettingsError: for a setting that the Trainer decides or that only `prune` takes, and as `PruneConfig`.
    """
    names = [(name, name) for name in PruneConfig.model_fields] + [(ours, name) for name, ours in TRAINER_NAMES.items()]
    decided = {
        ours: f"the Trainer decides it, with TrainingArguments({theirs}=...)"
        for ours, theirs in reversed(names)
        if theirs in TrainingArguments.__dataclass_fields__
    }
    check_taken("PruningCallback", settings, CALLBACK, decided)
    made = PruneConfig.create(config, **settings)
    used = made.model_dump(include=set(names_of(*CALLBACK)))
    defaults = PruneConfig()
    unused = sorted(name for name, value in made if name not in used and value != getattr(defaults, name))
    if unused:
        warnings.warn(
            "not used of the config, because the Trainer's arguments decide it or it is for prune alone: "
            f"{', '.join(unused)}",
            UserWarning,
            stacklevel=3,
        )
    return PruneConfig(**used, method="cofi")


def check_arguments(args: Any, state: Any, model: nn.Module, *, taught: bool) -> None:
    """Make sure that the Trainer runs in a way that gates can follow.

    :param args: the Trainer's `TrainingArguments`, `state` its `TrainerState`.
    :raises SettingsError: naming the first argument that they cannot.
    """
    check_processes(args.world_size)
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
    undivided = kind == "NO" or kind.startswith("MULTI_")
    if not undivided or any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
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
            "added; leave it out, the teacher's outputs are smooth labels already"
        )


def rows_again(
    loader: Any, model: PreTrainedModel, structure: Structure, config: PruneConfig, args: Any, *, taught: bool
) -> Batches | None:
    """Batches of the Trainer's rows, made anew so that its own loader is not touched; None where not needed.

    :raises SettingsError: when they are needed and the data set has no length.
    :raises DataError: when the first batch is out of the model's range.
    """
    units = config.one_shot_units or config.units
    looks = {
        "a teacher": taught,
        "warm_start, which can be False,": config.warm_start,
        "one_shot_share, which can be 0,": config.starts_from_one_shot and can_start(structure, units),
    }
    if not any(looks.values()):
        return None
    dataset = getattr(loader, "dataset", None)
    if dataset is None or isinstance(dataset, IterableDataset):
        needs = " and ".join(name for name, asked in looks.items() if asked)
        raise SettingsError(f"rows are looked at beforehand, for {needs} and this train_dataset has no length")
    own = args.per_device_train_batch_size
    step = own * args.gradient_accumulation_steps * args.world_size
    again: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=min(step, max(own, LARGE)),
        shuffle=True,
        generator=torch.Generator().manual_seed(config.seed),
        collate_fn=loader.collate_fn,
    )
    return prepare(again, model, batch_size=1, seed=config.seed, need_labels=False, name="train_dataset")

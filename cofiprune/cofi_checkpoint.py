"""Reading the directories of the original CoFi release as ordinary compacted models.

There are two forms. *Released*: weights that are cut already, under a configuration that still states the original
sizes; their shapes tell the kept units. *Full*: weights of the original shapes and `zs.pt`, the masks of a pruning run,
which are folded in. The family's adapter tells the units of each parameter. The files are pickles: only tensors are
read from them, and nothing is ever executed.

Xia, Zhong, Chen, "Structured Pruning Learns Compact and Accurate Models", ACL 2022, arXiv:2204.00408.
"""

from __future__ import annotations

import pickle
import re
import shutil
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from cofiprune.adapter import adapter_for, expand
from cofiprune.compaction.slicing import compacted, reshape_skeleton
from cofiprune.errors import CheckpointError, PlanError, explained, one_line
from cofiprune.files import read_json
from cofiprune.plan import Plan
from cofiprune.structure import Kind, Structure

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_CONFIG, _WEIGHTS, _MASKS = "config.json", "pytorch_model.bin", "zs.pt"
_KIND_OF_MASK: Mapping[str, Kind] = {
    "head_z": "heads",
    "head_layer_z": "attention",
    "intermediate_z": "intermediate",
    "mlp_z": "ffn",
    "hidden_z": "hidden",
}
# Linear layers of the layerwise distillation, which the original drops after training.
_DISTILLATION = ("layer_transformation.", "mha_layer_transformation.", "emb_transformation.")
# Entries that the original's runs add to a configuration: switches of its training code, heads that it counts as
# pruned (its widths say otherwise), and entries that are written anew when the model is saved.
_CONFIG_LEFTOVERS = (
    "architectures", "do_distill", "do_emb_distill", "do_layer_distill", "do_mha_layer_distill", "dtype",
    "gradient_checkpointing", "_name_or_path", "output_attentions", "output_hidden_states", "pruned_heads",
    "return_dict", "torch_dtype", "transform_embedding", "transformers_version",
)  # fmt: skip
# The order of the released MNLI models, which is that of the processors they were trained with; GLUE's own is
# 0 entailment, 1 neutral, 2 contradiction.
_MNLI_LABELS = ("contradiction", "entailment", "neutral")
_TOKENIZER_FILES = ("tokenizer*.json", "vocab.*", "merges.txt", "*_tokens*.json", "*.model")
_TOLERANCE = 1e-6  # float32 rounding of a sigmoid


def load_cofi_checkpoint(path: str | Path, *, task_head: str | None = None) -> PreTrainedModel:
    """Load a directory written by the original CoFi release, in either of its forms.

    The masks of the full form are folded into the weights exactly: the model computes the same as the original *under
    its masks*. The original's own compaction differs from that for fractional hidden masks, and for open blocks with
    every inner unit masked, whose bias and norm still act: such a block keeps one inner unit here, with zeros for
    output weights. A mask that is missing in `zs.pt` is all ones.

    Labels keep their names. Unnamed ones (`LABEL_0`, ...) get the order of the released models where `finetuning_task`
    is "mnli": 0 contradiction, 1 entailment, 2 neutral.

    :param path: a directory with `config.json`, `pytorch_model.bin` and, for the full form, `zs.pt`.
    :param task_head: ending of the class to load, such as "ForQuestionAnswering"; by default that of `architectures`
        in the configuration.
    :return: a compacted model of the family's ordinary class, on the CPU, in evaluation mode.
    :raises CheckpointError: when files are missing, damaged, contain code, or do not belong together.
    :raises AdapterError: when the family has no adapter.
    """
    folder = _directory(path)
    entries = _entries(folder / _CONFIG)
    # Norms had `gamma` and `beta` in the oldest checkpoints.
    modern = ((re.sub(r"\.gamma$", ".weight", name), value) for name, value in _tensors(folder / _WEIGHTS).items())
    weights = {re.sub(r"\.beta$", ".bias", name): value for name, value in modern}
    model = _dense_model(folder, entries, task_head, weights)
    structure = adapter_for(model).structure(model)
    weights, gone = _matched(folder, model, structure, weights)
    kept = _kept(folder, structure, weights, gone)
    masks = _tensors(folder / _MASKS) if (folder / _MASKS).is_file() else None
    cut = any(kept[name] < size for name, size in structure.sizes.items())
    _check_form(folder, cut=cut, masked=masks is not None)
    if cut:
        reshape_skeleton(model, structure, kept)
    with explained(CheckpointError, f"{folder / _WEIGHTS} does not fit {_CONFIG}", RuntimeError):
        # The other entries of the state dict are the markers of removed blocks.
        model.load_state_dict({**model.state_dict(), **weights})
    if masks is not None:
        values = _mask_values(folder / _MASKS, structure, masks)
        _keep_open_blocks(model, structure, values)
        with explained(CheckpointError, f"{folder / _MASKS}", PlanError):
            plan = Plan.from_values(structure, values)
        model = compacted(model, structure, plan)
    model.train(False)
    return model


def convert(path: str | Path, out: str | Path, *, task_head: str | None = None) -> PreTrainedModel:
    """Write a directory of the original CoFi release as an ordinary compacted model, tokenizer files included.

    :param out: the directory for `config.json` and `model.safetensors`; made when it is not there.
    :return: the model that was written.
    :raises CheckpointError: as for `load_cofi_checkpoint`, or when `out` cannot be written to.
    """
    source, target = _directory(path), Path(out)
    if target.resolve() == source.resolve():
        raise CheckpointError(f"{target} is the directory to convert; choose another one to write to")
    with explained(CheckpointError, f"cannot write to {target}", OSError):
        target.mkdir(parents=True, exist_ok=True)
    model = load_cofi_checkpoint(source, task_head=task_head)
    model.save_pretrained(target)
    for file in (file for pattern in _TOKENIZER_FILES for file in source.glob(pattern)):
        shutil.copyfile(file, target / file.name)
    return model


def _check_form(folder: Path, *, cut: bool, masked: bool) -> None:
    """Make sure that a directory has one of the two forms: weights of final sizes, or masks for them."""
    if cut and masked:
        raise CheckpointError(
            f"{folder}: the weights are cut already, and there are masks in {_MASKS} as well; if the weights are the "
            f"final ones, take {_MASKS} out of the directory"
        )
    if not cut and not masked:
        raise CheckpointError(
            f"{folder} is in neither form of the original CoFi: the weights have their full size and there is no "
            f"{_MASKS} (a pickled l0_module.pt is never read); add it, or load an unpruned model by from_pretrained"
        )


def _directory(path: str | Path) -> Path:
    folder = Path(path)
    if not folder.exists():
        raise CheckpointError(
            f"no directory {folder}; load_cofi_checkpoint reads local directories, fetch a released model first: "
            "hf download princeton-nlp/CoFi-MNLI-s95 --local-dir DIR"
        )
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give the directory that holds {_CONFIG} and {_WEIGHTS}")
    missing = [name for name in (_CONFIG, _WEIGHTS) if not (folder / name).is_file()]
    if missing:
        found = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) or "nothing"
        ordinary = (folder / "model.safetensors").is_file()
        hint = "; directories with model.safetensors load by from_pretrained" if ordinary else ""
        raise CheckpointError(f"{folder} has no {' and no '.join(missing)}; in it: {found}{hint}")
    return folder


def _entries(file: Path) -> dict[str, Any]:
    """Read the entries of a configuration."""
    entries = read_json(file, CheckpointError, f"{file} is damaged, it is not a JSON object")
    expected = {"model_type": str, "architectures": list | None}
    if not all(isinstance(entries.get(name), kind) for name, kind in expected.items()):
        raise CheckpointError(f"{file} is not a model's configuration: it has no model_type")
    if "quantization_config" in entries:
        raise CheckpointError(f"{file.parent} is not a directory of the original CoFi; load it by from_pretrained")
    return entries


def _tensors(file: Path) -> dict[str, Tensor]:
    """Read a pickled dict of tensors to the CPU, without executing anything in it."""
    try:
        with warnings.catch_warnings():
            # torch warns of pickle protocols that it may not fully support; if it does not, it fails as well.
            warnings.simplefilter("ignore")
            payload = torch.load(file, map_location="cpu", weights_only=True)
        # torch does not compare the checksums that it writes.
        broken = zipfile.ZipFile(file).testzip() if zipfile.is_zipfile(file) else None
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code is None:
            raise CheckpointError(f"{file} is damaged, or a pickle of anything but tensors; fetch it again") from error
        raise CheckpointError(
            f"{file} contains pickled code ({code[1]}), which is never executed; a checkpoint holds tensors only"
        ) from error
    except Exception as error:  # a damaged file may raise anything
        raise CheckpointError(f"{file} is damaged or cannot be read: {one_line(error)}; fetch it again") from error
    if broken is not None:
        raise CheckpointError(f"{file} is damaged: the checksum of {broken!r} in it is wrong; fetch it again")
    if not isinstance(payload, dict):
        raise CheckpointError(f"{file} holds a {type(payload).__name__}, expected a dict of tensors")
    for name, value in payload.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{file} holds a {type(value).__name__} under {name!r}, expected tensors only")
    return {name: value.detach() for name, value in payload.items()}


def _dense_model(
    folder: Path, entries: dict[str, Any], task_head: str | None, weights: Mapping[str, Tensor]
) -> PreTrainedModel:
    """Build the dense model of the configuration, with random weights."""
    architecture = str(next(iter(entries.get("architectures") or ()), ""))
    ending = task_head or "".join(re.findall(r"For[A-Z]\w*$", architecture))
    auto = getattr(transformers, f"AutoModel{ending}", None)
    if not ending.startswith("For") or auto is None:
        raise CheckpointError(
            f"{folder / _CONFIG} names the architecture {architecture or None!r}, which tells no task head; give one "
            "as task_head, such as 'ForSequenceClassification' or 'ForQuestionAnswering'"
        )
    config = _config(folder / _CONFIG, entries)
    kinds = {value.dtype for value in weights.values() if value.is_floating_point()}
    dtype = kinds.pop() if len(kinds) == 1 else torch.float32
    problem = f"{folder / _CONFIG} gives no {config.model_type} model"
    # A value that the modelling code cannot use may raise anything.
    with explained(CheckpointError, problem, Exception), torch.random.fork_rng(devices=[]):
        model: PreTrainedModel = auto.from_config(config, dtype=dtype)
    # The original's classes have the name of the ordinary class with a prefix of their own.
    if task_head is None and not architecture.endswith(type(model).__name__):
        raise CheckpointError(
            f"{folder / _CONFIG} contradicts itself: the architecture {architecture!r} is not of the model_type "
            f"{config.model_type!r}; take the {_CONFIG} that belongs to the weights"
        )
    return model


def _config(file: Path, entries: dict[str, Any]) -> PretrainedConfig:
    settings = {name: value for name, value in entries.items() if name not in _CONFIG_LEFTOVERS}
    model_type = settings.pop("model_type")
    if model_type not in transformers.CONFIG_MAPPING:
        raise CheckpointError(f"{file} has the model_type {model_type!r}, which transformers does not know")
    # The validators of a configuration have exceptions of their own.
    with explained(CheckpointError, f"{file} is no valid {model_type} configuration", Exception):
        config: PretrainedConfig = transformers.AutoConfig.for_model(model_type, **settings)
    unnamed = all(re.fullmatch(r"(LABEL_)?\d+", str(label)) for label in (config.id2label or {}).values())
    is_mnli = str(getattr(config, "finetuning_task", None)).lower() == "mnli"
    if is_mnli and unnamed and config.num_labels == len(_MNLI_LABELS):
        config.id2label = dict(enumerate(_MNLI_LABELS))
        config.label2id = {label: index for index, label in config.id2label.items()}
    return config


def _matched(
    folder: Path, model: PreTrainedModel, structure: Structure, weights: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], set[str]]:
    """Return the weights that belong to the model, and the gates of the blocks that are missing in the file."""
    file, prefix = folder / _WEIGHTS, model.base_model_prefix
    if not any(name.startswith(f"{prefix}.") for name in weights):
        common = Counter(name.split(".")[0] for name in weights).most_common(1)
        raise CheckpointError(
            f"{file} belongs to another model: its names start with {common[0][0] if common else None!r}, those of the "
            f"{model.config.model_type!r} model of {_CONFIG} with {prefix!r}; take the {_CONFIG} that belongs to it"
        )
    for layer in structure.layers:
        if not any(name.startswith(f"{layer}.") for name in weights):
            raise CheckpointError(f"{file} has nothing of {layer!r}, one of {len(structure.layers)} by {_CONFIG}")
    exits = {spec.gate: spec.name for spec in structure.parameters if spec.gated and len(spec.shape) > 1}
    gone = {gate for gate, name in exits.items() if gate is not None and name not in weights}
    wanted = set(model.state_dict())
    norms = {norm.module for norm in structure.norms}
    for spec in structure.parameters:
        if spec.gate in gone:
            wanted.discard(spec.name)
            # The original leaves the norm of a removed block in the file, at a width that means nothing.
            if spec.name in weights and spec.name.rpartition(".")[0] not in norms:
                raise CheckpointError(f"{file} is incomplete: it has {spec.name!r} without {exits[spec.gate]!r}")
    if missing := sorted(wanted - set(weights)):
        raise CheckpointError(f"{file} is incomplete: {missing[0]!r} is missing ({len(missing)} such names)")
    if extra := sorted(set(weights) - wanted - _leftovers(model, structure, weights)):
        raise CheckpointError(
            f"{file} does not fit {_CONFIG}: a {type(model).__name__} of {len(structure.layers)} layers has no "
            f"{extra[0]!r} ({len(extra)} such names); take the {_CONFIG} that belongs to it"
        )
    return {name: value for name, value in weights.items() if name in wanted}, gone


def _leftovers(model: PreTrainedModel, structure: Structure, names: Mapping[str, Tensor]) -> set[str]:
    """Names that may be in the file although the model does not use them."""
    stem = adapter_for(model).describe(model.config).stem
    unused = [f"{model.base_model_prefix}.{path}." for row in stem if row.optional for path in expand(row.modules)]
    known = {spec.name for spec in structure.parameters} | {name for name, _ in model.named_buffers()}
    return {name for name in names if name in known or name.startswith((*_DISTILLATION, *unused))}


def _kept(folder: Path, structure: Structure, weights: Mapping[str, Tensor], gone: set[str]) -> dict[str, int]:
    """Return the number of kept units of every group by the shapes in the file."""
    kept = dict(structure.sizes)
    for block in structure.blocks:
        if block.gate in gone:
            kept.update({name: 0 for name in (block.gate, block.inner) if name is not None})
    first: dict[str, str] = {}
    for spec in structure.parameters:
        if spec.gate in gone or spec.name not in weights:
            continue
        shape = tuple(weights[spec.name].shape)
        fits = len(shape) == len(spec.shape)
        for side, length, full in zip(spec.sides, shape, spec.shape, strict=False):
            if side is None:
                fits = fits and length == full
                continue
            count, remainder = divmod(length, side.copies * side.block)
            fits = fits and not remainder and 0 < count <= side.units
            if fits and kept[side.group] != count and side.group in first:
                raise CheckpointError(
                    f"{folder / _WEIGHTS} contradicts itself on {side.group!r}: {kept[side.group]} of {side.units} are "
                    f"left by {first[side.group]!r}, {count} by {spec.name!r}"
                )
            kept[side.group] = count
            first.setdefault(side.group, spec.name)
        if not fits:
            raise CheckpointError(
                f"{folder / _WEIGHTS} does not fit {_CONFIG}: {spec.name!r} has the shape {shape}, which is no cut of "
                f"{spec.shape}"
            )
    return kept


def _mask_values(file: Path, structure: Structure, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the masks by group, [units] each, from tensors [layers, 1, .., units, ..] and [hidden]."""
    values: dict[str, Tensor] = {}
    for key, mask in masks.items():
        if key not in _KIND_OF_MASK:
            raise CheckpointError(f"{file} has the mask {key!r}; known are {', '.join(_KIND_OF_MASK)}")
        groups = [group for group in structure.groups if group.kind == _KIND_OF_MASK[key]]
        shape = [1 if key == "hidden_z" else len(groups), groups[0].size if groups else 0]
        if [length for length in mask.shape if length != 1] != [length for length in shape if length != 1]:
            raise CheckpointError(
                f"{file}: mask {key!r} has the shape {tuple(mask.shape)}; {_CONFIG} asks for {shape[0]} x {shape[1]}"
            )
        rows = mask.double().reshape(shape)
        if not bool(((rows >= -_TOLERANCE) & (rows <= 1 + _TOLERANCE)).all()):
            raise CheckpointError(f"{file}: mask {key!r} has values that are not numbers in [0, 1]")
        values.update({group.name: row.clamp(0, 1) for group, row in zip(groups, rows, strict=True)})
    return values


def _keep_open_blocks(model: PreTrainedModel, structure: Structure, values: dict[str, Tensor]) -> None:
    """Keep blocks whose gate is open although every inner unit is masked: their bias and norm still act.

    Under masks the original bypasses a block only when its output sums to zero. In a plan a block without inner units
    is removed, so one unit stays, with a zero for each of its output weights.
    """
    for block in structure.blocks:
        inner, gate = values.get(block.inner or ""), values.get(block.gate)
        if block.inner is None or inner is None or inner.any() or (gate is not None and not gate.any()):
            continue
        last = [spec for spec in structure.parameters if spec.gate == block.gate and spec.gated]
        if not any(bool(model.get_parameter(spec.name).any()) for spec in last if len(spec.shape) == 1):
            continue
        for spec in last:
            if any(side.group == block.inner for side in spec.prunable.values()):
                model.get_parameter(spec.name).data.zero_()
        inner[0] = 1

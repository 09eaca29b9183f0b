"""Small random models to test adapters on, and to derive a structure from: in float64, with inputs that have padding.

Biases and norms are random too: with the zeros and ones of a new model, laws hold that a trained model would break. The
sizes tell axes apart that have the same length by chance in a larger model.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import transformers.models.auto.modeling_auto as auto
from torch import Tensor
from transformers import AutoConfig
from transformers.models.auto.auto_factory import _LazyAutoMapping

from cofiprune.compaction.slicing import compacted
from cofiprune.data.synthetic import synthetic_inputs
from cofiprune.data.tasks import main_input
from cofiprune.errors import AdapterError, CofipruneError, DataError, one_line
from cofiprune.masking import attach_to
from cofiprune.masks import MaskRegistry
from cofiprune.parts import heads_of_stages
from cofiprune.plan import Plan
from cofiprune.structure import UNIT_KINDS, Structure, UnitKind

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Batch = Mapping[str, Tensor]
Values = Mapping[str, Tensor]
"""Masks by group name, [units] each."""
Choice = tuple[UnitKind, ...]

# Different numbers for different things, so that a mistaken axis does not fit by chance.
_SIZES: Mapping[str, Any] = {
    "num_hidden_layers": 2, "num_attention_heads": 4, "d_kv": 6,
    "hidden_size": 24, "embedding_size": 24, "coordinate_size": 4, "shape_size": 4,
    "intermediate_size": 34, "hidden_dim": 34, "d_ff": 34, "encoder_ffn_dim": 34,
    "vocab_size": 40, "max_position_embeddings": 32, "type_vocab_size": 2,
    "image_size": 8, "input_size": 8, "crop_size": 8, "patch_size": 4, "encoder_stride": 4,
    "num_frames": 4, "frames_per_clip": 4,
    "num_mel_bins": 8, "max_length": 16, "max_source_positions": 8,
    "attention_window": 4, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    "conv_dim": (6, 6), "conv_kernel": (4, 3), "conv_stride": (2, 2),
}  # fmt: skip
# For models that divide their hidden dimensions further than by heads: by groups, or among coordinates.
_WIDE = dict.fromkeys(("hidden_size", "embedding_size"), 192) | dict.fromkeys(
    ("intermediate_size", "hidden_dim", "d_ff", "encoder_ffn_dim"), 136
)
# Of encoders that make images smaller from stage to stage: several windows in the first, several vectors in the last.
_STAGED: Mapping[str, Any] = {"image_size": 64, "window_size": 2, "spec_size": 64, "encoder_stride": 32}
_OF_ALL_STAGES = (
    "num_hidden_layers", "num_layers", "num_encoder_blocks", "num_attention_heads", "num_heads", "hidden_size",
    "patch_size", "num_mel_bins",
)  # fmt: skip
# Classes of these tasks read the encoder through a decoder, or are one.
_OTHER_TASKS = ("CAUSAL", "SEQ_TO_SEQ", "SPEECH_SEQ", "WITH_LM_HEAD", "TIME_SERIES", "VISION_2", "TEXT_TO")

_TOKENS, _FRAMES = 9, 40
_LARGEST = 30_000_000
"""Parameters up to which a model is tried out itself, where no tiny copy can be built."""


@dataclass(frozen=True)
class Subject:
    """A model under test (float64, evaluation mode), its inputs and its structure."""

    model: PreTrainedModel
    batch: Batch
    structure: Structure

    @contextmanager
    def masked(self, units: Choice | None = None, values: Values | None = None) -> Iterator[MaskRegistry]:
        """Attach masks over some unit kinds for the length of a `with` block.

        :param values: of the masks; ones for groups that are not named.
        """
        with attach_to(self.model, self.structure, units) as masks:
            masks.update(values or {})
            yield masks

    def compacted(self, plan: Plan) -> PreTrainedModel:
        """Return the model without what a plan removes."""
        return compacted(self.model, self.structure, plan)

    def outputs(self) -> dict[str, Tensor]:
        """Return the model's outputs, as `outputs` does."""
        return outputs(self.model, self.batch)


def tiny_config(model_type: str, **settings: Any) -> PretrainedConfig:
    """Return a configuration of a family with two layers, four heads and 24 hidden dimensions.

    :param settings: go before these sizes.
    """
    sizes = tiny_sizes(AutoConfig.for_model(model_type))
    return AutoConfig.for_model(model_type, **{**sizes, **settings})


def tiny_sizes(config: PretrainedConfig, *, wide: bool = False) -> dict[str, Any]:
    """Return the small sizes by the names that a configuration has for them.

    :param wide: with 192 hidden dimensions instead of 24.
    """
    chosen = {**_SIZES, **_WIDE} if wide else _SIZES
    names = {name: config.attribute_map.get(name, name) for name in chosen}
    sizes = {name: chosen[key] for key, name in names.items() if hasattr(config, name)}
    if stages := _stages(config, 48 if wide else 6):
        sizes = {name: value for name, value in sizes.items() if name not in _OF_ALL_STAGES} | stages
    if isinstance(getattr(config, "image_size", None), list | tuple):
        sizes["image_size"] = type(config.image_size)([sizes["image_size"]] * len(config.image_size))
    for name, value in vars(config).items():
        # Further vocabularies: of entities, of glyphs, of tags.
        if name not in sizes and name.endswith(("vocab_size", "num_buckets")) and isinstance(value, int) and value > 64:
            sizes[name] = 64
    if getattr(config, "pad_token_id", 0) is None:
        sizes["pad_token_id"] = 0
    ids = [name for name in vars(config) if name.endswith("_token_id")]
    for place, name in enumerate(ids, start=1):
        value = getattr(config, name)
        if isinstance(value, int) and value >= _SIZES["vocab_size"]:
            sizes[name] = 0 if name == "pad_token_id" else place
    return sizes


def _stages(config: PretrainedConfig, width: int) -> dict[str, Any]:
    """The small sizes of an encoder of stages: their heads, narrow, and two layers in each; {} for any other."""
    heads = heads_of_stages(config)
    if not heads:
        return {}
    small: dict[str, Any] = {}
    if hasattr(config, "patch_embeds_hidden_size"):
        small["hidden_size"] = width * heads[0] * 2 ** (len(heads) - 1)
    for name in ("embed_dim", "hidden_sizes", "patch_embeds_hidden_size"):
        value = getattr(config, name, None)
        if value is not None:
            small[name] = [width * count for count in heads] if isinstance(value, list | tuple) else width * heads[0]
    for name in ("depths", "depth"):
        if isinstance(getattr(config, name, None), list | tuple):
            small[name] = [min(count, 2) for count in getattr(config, name)]
    return small | {name: size for name, size in _STAGED.items() if hasattr(config, name)}


def small_config(config: PretrainedConfig, *, wide: bool = False) -> PretrainedConfig:
    """Return the same configuration with two layers, four heads and 24 hidden dimensions, or 192 with `wide`."""
    sizes = tiny_sizes(config, wide=wide)
    entries: dict[str, Any] = copy.deepcopy(config.to_dict())
    for name in ("quantization_config", "architectures", "transformers_version", "dtype", "torch_dtype"):
        entries.pop(name, None)
    layers = getattr(config, "num_hidden_layers", None)
    for name, value in entries.items():
        if isinstance(value, list) and len(value) == layers and name != "conv_dim" and "depths" not in sizes:
            entries[name] = value[:2]  # one entry per layer
    entries.update(sizes)
    if isinstance(entries.get("num_key_value_heads"), int):
        shared = config.num_key_value_heads < config.num_attention_heads
        entries["num_key_value_heads"] = 2 if shared else 4
    if isinstance(entries.get("head_dim"), int):
        entries["head_dim"] = 48 if wide else 6
    small: PretrainedConfig = type(config).from_dict(entries)
    small._attn_implementation = config._attn_implementation
    return small


def head_classes(config: PretrainedConfig) -> tuple[type[PreTrainedModel], ...]:
    """Return the bare encoder and every head class that transformers' Auto classes have for a configuration.

    Where they have none, as for the parts of some pairs of encoders: the classes of its modelling file that take it.
    """
    found: dict[str, type[PreTrainedModel]] = {}
    for name, mapping in vars(auto).items():
        if isinstance(mapping, _LazyAutoMapping) and not any(word in name for word in _OTHER_TASKS):
            # `get` imports this family only; the mapping's keys would import every one that there is.
            entry = mapping.get(type(config), None)
            classes = entry if isinstance(entry, tuple | list) else (entry,)
            found.update({cls.__name__: cls for cls in classes if cls is not None})
    if not found:
        modeling = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
        for name, cls in vars(modeling).items():
            if getattr(cls, "config_class", None) is type(config) and not name.endswith("PreTrainedModel"):
                found[name] = cls
    return tuple(found[name] for name in sorted(found))


def unit_choices() -> tuple[tuple[UnitKind, ...], ...]:
    """Return the 15 non-empty choices of unit kinds."""
    return tuple(
        choice for size in range(1, len(UNIT_KINDS) + 1) for choice in itertools.combinations(UNIT_KINDS, size)
    )


def specimen(model: PreTrainedModel, generator: torch.Generator) -> PreTrainedModel:
    """Return a copy of a model in float64 and evaluation mode with random parameters, biases and norms included."""
    sample: PreTrainedModel = copy.deepcopy(model).double()
    sample.train(False)
    with torch.no_grad():
        for name, parameter in sample.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if parameter.dim() > 1:
                noise = noise * (2 / max(1, parameter[:1].numel()) ** 0.5)  # some have no elements
            else:
                noise = noise * 0.3 + (1 if name.endswith("weight") else 0)
            parameter.copy_(noise)
    return sample


def inputs(model: PreTrainedModel, generator: torch.Generator) -> dict[str, Tensor]:
    """Return a batch of three examples for a model, padded to different lengths where it reads text or sound.

    :raises AdapterError: when the model's main input is of a kind that this function does not know.
    """
    config, name = model.config, main_input(model)
    reads = inspect.signature(model.forward).parameters
    if name == "pixel_values" and "spatial_shapes" in reads:
        # Images of 2 x 2 patches that were cut and flattened before, the second of them one patch high.
        shape = (3, 4, config.num_channels * config.patch_size**2)
        return {
            name: torch.randn(shape, generator=generator).to(model.dtype),
            "pixel_attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]]),
            "spatial_shapes": torch.tensor([[2, 2], [1, 2], [2, 2]]),
        }
    length = _TOKENS if name == "input_ids" else _FRAMES
    try:
        batch = synthetic_inputs(model, batch_size=3, seq_len=length, generator=generator, padding=True)
    except DataError as error:
        raise AdapterError(f"{error}. Pass a batch for it: batch={{{name!r}: ...}}") from error
    if hasattr(config, "conv_stride") or hasattr(config, "feature_projection_input_dim"):
        length = batch[name].shape[1]
        batch["attention_mask"] = torch.ones(3, length, dtype=torch.long)
        batch["attention_mask"][1, length // 2 :] = 0
    side = getattr(config, "input_size", None) or getattr(config, "image_size", None)
    if (
        name == "input_ids"
        and "pixel_values" in reads
        and isinstance(side, int)
        and getattr(config, "visual_embed", True)
    ):
        image = torch.randn(3, getattr(config, "num_channels", 3), side, side, generator=generator)
        batch["pixel_values"] = image.to(model.dtype)  # beside the text
    if "noise" in reads and name == "pixel_values":  # that chooses the patches which the model sees
        patches = [size // config.patch_size for size in batch[name].shape[-2:]]
        batch["noise"] = torch.rand(3, math.prod(patches), generator=generator).to(model.dtype)
    if "global_attention_mask" in reads and batch[name].dim() == 2:  # tokens that see all others, and are seen by them
        batch["global_attention_mask"] = torch.zeros_like(batch[name])
        batch["global_attention_mask"][:, 0] = batch["global_attention_mask"][0, 5] = 1
    if {"entity_ids", "entity_position_ids"} <= set(reads) and batch[name].dim() == 2:  # entities that the text names
        batch["entity_ids"] = torch.randint(1, 9, (3, 2), generator=generator)
        batch["entity_attention_mask"] = torch.ones(3, 2, dtype=torch.long)
        batch["entity_position_ids"] = torch.tensor([[[0, 1, -1], [1, -1, -1]]]).repeat(3, 1, 1)
    return {name: value.to(model.device) for name, value in batch.items()}


def tiny_copy(model: PreTrainedModel) -> tuple[PreTrainedModel, Batch]:
    """Return a tiny random model of a model's class and settings, and inputs for it.

    :raises AdapterError: when none can be built and run, and the model itself is large or does not run either.
    """
    generator = torch.Generator().manual_seed(0)
    problems = []
    for build in (_small, partial(_small, wide=True), _itself):
        try:
            tiny = specimen(build(model), generator)
            batch = inputs(tiny, generator)
            _check_runs(tiny, batch)
        except Exception as error:  # raised by the model's own code, in any way
            reason = error.__cause__ if isinstance(error.__cause__, DataError) else error  # that asks for no batch
            kind = "" if isinstance(reason, CofipruneError) else f"{type(reason).__name__}: "
            problems.append(kind + one_line(reason))
        else:
            return tiny, batch
    small, whole = problems[0], problems[-1]
    both = (
        f": {whole}" if small == whole else f", neither as a small model of its kind ({small}) nor as it is ({whole})"
    )
    raise AdapterError(f"it could not be run on made-up inputs{both}")


def _check_runs(model: PreTrainedModel, batch: Batch) -> None:
    modules = {id(module) for module in model.modules()}
    first, second = (outputs(model, batch) for _ in range(2))
    if not all(torch.allclose(value, second[name], rtol=0, atol=0, equal_nan=True) for name, value in first.items()):
        raise AdapterError("its outputs differ each time it runs")
    new = [path for path, module in model.named_modules() if id(module) not in modules]
    if new:
        raise AdapterError(
            f"it puts other modules into its own place when it runs, at {new[0]!r}, unless a setting of its "
            "configuration stops it (attention_type='original_full', for BigBird)"
        )


def _small(model: PreTrainedModel, *, wide: bool = False) -> PreTrainedModel:
    tiny = type(model)(small_config(model.config, wide=wide))
    names, found = (
        {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name, _ in each.named_parameters()} for each in (model, tiny)
    )
    if names != found:
        raise AdapterError(f"it differs from the model in {', '.join(sorted(names ^ found)[:3])}")
    return tiny


def _itself(model: PreTrainedModel) -> PreTrainedModel:
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > _LARGEST:
        raise AdapterError(f"it has {size:,} parameters, too many to be tried out")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise AdapterError("it has no weights")
    return model


def outputs(model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    """Run a model without gradients and return the tensors among its outputs by name."""
    with torch.no_grad():
        return tensors(model(**batch))


def tensors(output: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of floating-point numbers among a model's outputs by name, `name.i` for those in a tuple."""
    found = {}
    for name, value in output.items():
        each = {f"{name}.{i}": item for i, item in enumerate(value)} if isinstance(value, tuple) else {name: value}
        found.update({key: item for key, item in each.items() if isinstance(item, Tensor)})
    return {name: value for name, value in found.items() if value.is_floating_point()}


def random_values(size: int, generator: torch.Generator, *, fractional: bool) -> Tensor:
    """Return a random mask [size] that keeps about 6 in 10 of its units, and at least one of several."""
    open_ = torch.rand(size, generator=generator, dtype=torch.float64) < 0.6
    if size > 1:
        open_[torch.randint(size, (1,), generator=generator)] = True
    share = torch.rand(size, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    return open_ * (share if fractional else torch.ones_like(share))

"""A small double of a model: the same class with the same settings, but of sizes that tell its axes apart.

A structure is derived on it instead of on the model itself, because a run of it costs milliseconds, and because its
sizes are chosen to differ where those of the model may agree by chance.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from cofiprune.conformance.specimens import Batch, inputs, outputs, specimen, tiny_sizes
from cofiprune.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_LARGEST = 30_000_000
"""Parameters up to which a model that has no double is its own."""


def twin_of(model: PreTrainedModel) -> tuple[PreTrainedModel, Batch]:
    """Return a small random model like this one, in float64 and evaluation mode, and inputs for it.

    :raises AdapterError: when no small one can be built and run, and the model itself is large or does not run either.
    """
    generator = torch.Generator().manual_seed(0)
    problems = []
    for build in (_small, _wide, _itself):
        try:
            twin = specimen(build(model), generator)
            batch = double(inputs(twin, generator))
            modules = {id(module): path for path, module in twin.named_modules()}
            twice = [outputs(twin, batch) for _ in range(2)]
            if any(not _equal(value, twice[1][name]) for name, value in twice[0].items()):
                raise AdapterError("it gives other answers each time it runs")
            new = [path for path, module in twin.named_modules() if id(module) not in modules]
            if new:
                raise AdapterError(f"it puts other modules into its own place when it runs, at {new[0]!r}")
        except Exception as error:  # of whatever kind: it comes from inside the model
            problems.append(f"{type(error).__name__}: {error}".splitlines()[0])
        else:
            return twin, batch
    raise AdapterError(
        f"it could not be tried out on made-up inputs, neither by a small model of its kind ({problems[0]}) nor by "
        f"itself ({problems[-1]})."
    )


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors are the same, what is not a number included."""
    return left.shape == right.shape and bool(((left == right) | (left.isnan() & right.isnan())).all())


def double(batch: Batch) -> dict[str, torch.Tensor]:
    """A batch with its floating-point numbers in float64."""
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def _wide(model: PreTrainedModel) -> PreTrainedModel:
    return _small(model, wide=True)


def _small(model: PreTrainedModel, *, wide: bool = False) -> PreTrainedModel:
    twin = type(model)(small_config(model.config, wide=wide))
    missing = _kinds(model) ^ _kinds(twin)
    if missing:
        raise AdapterError(f"it differs from the model in {', '.join(sorted(missing)[:3])}")
    return twin


def _itself(model: PreTrainedModel) -> PreTrainedModel:
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > _LARGEST:
        raise AdapterError(f"it has {size:,} parameters, too many to be tried out")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise AdapterError("it has no weights")
    return model


def _kinds(model: PreTrainedModel) -> set[str]:
    """Names of the parameters, whatever layer they are in."""
    return {
        ".".join("*" if part.isdigit() else part for part in name.split(".")) for name, _ in model.named_parameters()
    }


def small_config(config: PretrainedConfig, *, wide: bool = False) -> PretrainedConfig:
    """The same configuration with two layers, four heads and 24 hidden dimensions, or 192."""
    sizes = tiny_sizes(config, wide=wide)
    entries: dict[str, Any] = copy.deepcopy(config.to_dict())
    for name in ("quantization_config", "architectures", "transformers_version", "dtype", "torch_dtype"):
        entries.pop(name, None)
    layers = getattr(config, "num_hidden_layers", None)
    for name, value in entries.items():
        if isinstance(value, list) and len(value) == layers and name != "conv_dim":
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

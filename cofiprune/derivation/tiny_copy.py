"""A tiny copy of a model: the same class with the same settings, of sizes that tell its axes apart.

A structure is derived on it instead of on the model itself, because it runs in milliseconds, and because sizes that
agree by chance in the model differ in it.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from cofiprune.conformance.specimens import Batch, double, inputs, outputs, specimen, tiny_sizes
from cofiprune.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_LARGEST = 30_000_000
"""Parameters up to which a model is tried out itself, where no tiny copy can be built."""


def tiny_copy(model: PreTrainedModel) -> tuple[PreTrainedModel, Batch]:
    """Return a tiny random model like this one, in float64 and evaluation mode, and inputs for it.

    :raises AdapterError: when none can be built and run, and the model itself is large or does not run either.
    """
    generator = torch.Generator().manual_seed(0)
    problems = []
    for build in (_small, _wide, _itself):
        try:
            tiny = specimen(build(model), generator)
            batch = double(inputs(tiny, generator))
            _check_runs(tiny, batch)
        except Exception as error:  # raised by the model's own code, in any way
            problems.append(f"{type(error).__name__}: {error}".splitlines()[0])
        else:
            return tiny, batch
    raise AdapterError(
        f"it could not be run on made-up inputs, neither as a small model of its kind ({problems[0]}) nor as it is "
        f"({problems[-1]})."
    )


def _check_runs(model: PreTrainedModel, batch: Batch) -> None:
    modules = {id(module) for module in model.modules()}
    first, second = (outputs(model, batch) for _ in range(2))
    if not all(torch.allclose(value, second[name], rtol=0, atol=0, equal_nan=True) for name, value in first.items()):
        raise AdapterError("its outputs differ each time it runs")
    new = [path for path, module in model.named_modules() if id(module) not in modules]
    if new:
        raise AdapterError(f"it puts other modules into its own place when it runs, at {new[0]!r}")


def _wide(model: PreTrainedModel) -> PreTrainedModel:
    return _small(model, wide=True)


def _small(model: PreTrainedModel, *, wide: bool = False) -> PreTrainedModel:
    tiny = type(model)(small_config(model.config, wide=wide))
    missing = _kinds(model) ^ _kinds(tiny)
    if missing:
        raise AdapterError(f"it differs from the model in {', '.join(sorted(missing)[:3])}")
    return tiny


def _itself(model: PreTrainedModel) -> PreTrainedModel:
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > _LARGEST:
        raise AdapterError(f"it has {size:,} parameters, too many to be tried out")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise AdapterError("it has no weights")
    return model


def _kinds(model: PreTrainedModel) -> set[str]:
    """Names of the parameters, without the numbers of layers."""
    return {
        ".".join("*" if part.isdigit() else part for part in name.split(".")) for name, _ in model.named_parameters()
    }


def small_config(config: PretrainedConfig, *, wide: bool = False) -> PretrainedConfig:
    """Return the same configuration with two layers, four heads and 24 hidden dimensions, or 192."""
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

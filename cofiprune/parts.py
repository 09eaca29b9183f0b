"""Models inside a model, and the one of them that is meant when the whole is passed.

An image classifier on one tower of CLIP, or a class of one's own around an encoder, is a head with an encoder inside
that has a configuration of its own. What is known of that encoder holds in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeGuard

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel


def is_transformers_model(model: object) -> TypeGuard[PreTrainedModel]:
    """Return whether a model is one of transformers."""
    from transformers import PreTrainedModel  # imported late: `import cofiprune` does without the second that it takes

    return isinstance(model, PreTrainedModel)


def outermost(
    model: nn.Module, wanted: Callable[[PreTrainedModel], bool] = lambda part: True, path: str = ""
) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield the transformers models in a model that a condition chooses, none inside another, and their paths."""
    for name, child in model.named_children():
        here = f"{path}.{name}" if path else name
        if is_transformers_model(child) and wanted(child):
            yield here, child
        else:
            yield from outermost(child, wanted, here)


def models_inside(model: nn.Module) -> list[tuple[str, PreTrainedModel]]:
    """Return the models that a model is made of, with their paths; none of one that is a model by itself.

    A part has a configuration of another class; what is under a head has the head's.
    """
    own = type(getattr(model, "config", None))
    found: list[tuple[str, PreTrainedModel]] = []
    for path, part in outermost(model, lambda part: type(part.config) is not own):
        inner = models_inside(part)
        found += [(f"{path}.{below}", each) for below, each in inner] or [(path, part)]
    return found


def encoder_within(model: PreTrainedModel) -> str:
    """Return the path of the encoder inside a head that has nothing else of the kind; "" for a model that has none."""
    parts = models_inside(model)
    if len(parts) != 1:
        return ""
    ((path, part),) = parts
    inside = set(part.modules())
    return "" if any(attends(module) for module in model.modules() if module not in inside) else path


def encoder_config(model: PreTrainedModel) -> PretrainedConfig:
    """Return the configuration that states the sizes of a model's encoder."""
    path = encoder_within(model)
    config: PretrainedConfig = model.get_submodule(path).config if path else model.config  # type: ignore[assignment]
    return config


def heads_of_stages(config: PretrainedConfig) -> list[int]:
    """Return the heads of every stage of an encoder, each with hidden dimensions of its own number; [] without any."""
    named = (getattr(config, name, None) for name in ("num_attention_heads", "num_heads"))
    return next((list(value) for value in named if isinstance(value, list | tuple)), [])


def attends(module: nn.Module) -> bool:
    """Return whether a module is an attention layer, by its name and a projection that is no image convolution.

    Some convolutional networks call the weighting of their channels attention.
    """
    name = type(module).__name__.lower()
    return ("attention" in name or "attn" in name) and any(value.dim() in (2, 3) for value in module.parameters())

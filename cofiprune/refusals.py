"""Refusals of models that cannot be pruned, before they are changed, with an alternative for each.

Always refused: objects that are no transformers model, PEFT adapters, quantised weights, decoders. Refused unless an
adapter is declared: models made of several, code from a model's own repository, decoder-only models, mixtures of
experts, networks without attention. The model's structure and configuration tell; no other package is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from cofiprune.errors import AdapterError
from cofiprune.parts import attends, is_transformers_model, models_inside, outermost
from cofiprune.record import METHOD

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_QUANTISED = ("torch.ao.nn.", "torchao.", "bitsandbytes.", "optimum.quanto.", "gptqmodel.", "awq.", "hqq.", "aqlm.")
"""Packages whose layers and tensors hold quantised weights."""


def refuse(model: object) -> None:
    """Refuse a model that no adapter can describe.

    :raises AdapterError: saying what it is and what to pass instead.
    """
    if isinstance(model, nn.Module):
        _refuse_peft(model)
    if not is_transformers_model(model):
        raise AdapterError(f"expected a transformers model (a PreTrainedModel), found {_name(model)}{_inside(model)}")
    _refuse_quantised(model)
    if getattr(model.config, "is_decoder", False):
        raise AdapterError(
            f"{_name(model)} is configured as a decoder; cofiprune prunes encoders. Load it with is_decoder=False."
        )
    if has_decoder(model):
        raise AdapterError(
            f"{_name(model)} is an encoder with a decoder; cofiprune prunes encoders. {_encoder_of(model)}"
        )


def refuse_undeclared(model: PreTrainedModel) -> None:
    """Refuse a model of a family without an adapter, where none can be derived for a model of its kind.

    :raises AdapterError: saying what it is and what to do.
    """
    reason = _reason(model)
    if reason:
        raise AdapterError(f"{_name(model)} {reason}")
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            refuse_computed(module, path)


def refuse_computed(module: nn.Module, path: str, name: str = "weight") -> None:
    """Refuse a tensor that a module computes from others in every pass, such as a normalised weight.

    :raises AdapterError: saying which, and how to make it a parameter.
    """
    if name in module._parameters or not isinstance(getattr(module, name, None), Tensor):
        return
    sources = " and ".join(each for each, _ in module.named_parameters() if each != "bias")
    raise AdapterError(
        f"the {name} of {path!r} is no parameter: it is computed from {sources} in every pass, and cannot be cut. Make "
        f"it one first, by torch.nn.utils.parametrize.remove_parametrizations(module, {name!r}), "
        f"torch.nn.utils.prune.remove(module, {name!r}) or torch.nn.utils.remove_weight_norm(module)"
    )


def _reason(model: PreTrainedModel) -> str | None:
    """The end of a sentence about why no adapter can be derived."""
    parts = encoders_inside(model)
    if parts:
        return f"is made of several models; cofiprune prunes one encoder at a time. {_pass(model, parts)}"
    if type(model).__module__.partition(".")[0] == "transformers_modules":
        return (
            "is code from a model's own repository (trust_remote_code); nothing is known about what it does. Load it "
            "with a class of transformers if there is one, or describe it: subclass cofiprune.Adapter and call "
            "cofiprune.register_adapter(MyAdapter()), see docs/how-to/add-an-adapter.md."
        )
    kind = f"({model.config.model_type}) is"
    if _is_causal(model):
        return f"{kind} a decoder-only model: each token sees those before it only. cofiprune prunes encoders."
    experts = [path for path, module in model.named_modules() if type(module).__name__.endswith("Experts")]
    if experts:
        return (
            f"is a mixture of experts ({experts[0]!r}): which feed-forward dimensions a token passes through is up to "
            "a router, so that they are no units that could be removed one by one. cofiprune prunes encoders whose "
            "tokens all take one way."
        )
    if any(attends(module) for module in model.modules()):
        return None
    convolutional = any(isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) for module in model.modules())
    what = "a convolutional network" if convolutional else "a network"
    return f"{kind} {what} without attention, and so without heads to remove. cofiprune prunes transformer encoders."


def _pass(model: nn.Module, parts: Sequence[tuple[str, nn.Module]]) -> str:
    """Sentences that say which parts of a model to pass, and what else reads their states."""
    shown = " or ".join(f"{path} ({_name(part)})" for path, part in parts)
    known = {id(parameter) for _, part in parts for parameter in part.parameters()}
    others = ((name, each) for name, each in model.named_parameters() if id(each) not in known)
    other = next((name for name, parameter in others if parameter.dim() > 1), None)
    reads = (
        ""
        if other is None
        else (
            f" Leave hidden dimensions whole, units=('layer', 'head', 'intermediate'): {other!r} and other weights "
            "outside may read them."
        )
    )
    return f"Pass {shown}, and put what compact() returns back in its place.{reads}"


def has_decoder(model: nn.Module) -> bool:
    """Return whether a model, or the model under its head, has a decoder in addition to its encoder."""
    base = getattr(model, str(getattr(model, "base_model_prefix", "")), model)
    return all(isinstance(getattr(base, part, None), nn.Module) for part in ("encoder", "decoder"))


def encoders_inside(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the encoders inside a model made of several, each with the expression that gets it from `model`.

    A model under a head has the head's configuration; a part has its own.
    """
    return [
        (_expression(path), part)
        for path, part in models_inside(model)
        if not _is_causal(part) and not getattr(part.config, "is_decoder", 0) and any(map(attends, part.modules()))
    ]


def _expression(path: str) -> str:
    return "model" + "".join(f"[{name}]" if name.isdigit() else f".{name}" for name in path.split("."))


def _refuse_peft(model: nn.Module) -> None:
    layers = [
        (path, module)
        for path, module in model.named_modules()
        if not {"base_layer", "lora_A"}.isdisjoint({*module._modules, *module._parameters})
    ]
    wrapper = hasattr(model, "peft_config") and not is_transformers_model(model)
    if not layers and not wrapper:
        return
    merged = sum(bool(getattr(module, "merged", False)) for _, module in layers)
    where = f" in {len(layers)} modules, {layers[0][0]!r} the first" if layers else ""
    state = f", {merged} of them merged and not taken out" if merged else ""
    raise AdapterError(
        f"{_name(model)} has PEFT adapters{where}{state}. Put them into the weights and take them out first: "
        "model = peft_model.merge_and_unload(), and pass that model; adapters that cannot be merged, such as prompts, "
        "are left out by peft_model.get_base_model()."
    )


def _refuse_quantised(model: nn.Module) -> None:
    stored: Any = getattr(model.config, "quantization_config", None)
    if stored is not None:
        entries = stored if isinstance(stored, dict) else stored.to_dict()
        method = entries.get("quant_method")
        if method != METHOD:
            raise AdapterError(f"{_name(model)} is quantised ({getattr(method, 'value', method)}). {_UNQUANTISED}")
    for path, module in model.named_modules():
        if f"{type(module).__module__}.".startswith(_QUANTISED):
            raise AdapterError(f"{_name(model)} is quantised ({path!r} is a {type(module).__name__}). {_UNQUANTISED}")
    for name, parameter in model.named_parameters():
        if _is_quantised(parameter):
            raise AdapterError(f"{_name(model)} is quantised ({name!r} is of {parameter.dtype}). {_UNQUANTISED}")


_UNQUANTISED = (
    "Its weights cannot be cut and scaled exactly: load it without quantisation, prune and compact it, and quantise "
    "the smaller model."
)


def _is_quantised(parameter: Tensor) -> bool:
    whole = not (parameter.dtype.is_floating_point or parameter.dtype.is_complex)
    return whole or parameter.dtype.itemsize == 1 or f"{type(parameter.data).__module__}.".startswith(_QUANTISED)


def _inside(model: object) -> str:
    """The models inside a wrapper, and how to get them."""
    if isinstance(model, type) and issubclass(model, nn.Module):
        return " (pass an instance, for example from from_pretrained)"
    if not isinstance(model, nn.Module):
        return ""
    held = [(_expression(path), part) for path, part in outermost(model)]
    if not held:
        return (
            ". A module of one's own becomes one by subclassing transformers.PreTrainedModel; "
            "docs/how-to/add-an-adapter.md shows how to describe it."
        )
    return f". It holds one: p{_pass(model, held)[1:]}"


def _encoder_of(model: nn.Module) -> str:
    """A sentence that says how to get the encoder of a model with a decoder."""
    parts = encoders_inside(model)
    if parts:
        return _pass(model, parts[:1])
    module = vars(sys.modules[type(model).__module__])
    alone = next((name for name in module if name.endswith("EncoderModel")), None)
    if alone is not None:
        return f"Load the encoder alone, by {alone}."
    return "Load or pass the encoder alone; model.get_encoder() returns it."


def _is_causal(model: nn.Module) -> bool:
    """Return whether tokens attend to earlier ones only.

    Attention modules of transformers state it. Where they do not, a decoder is a model that can generate, and neither
    fill masks nor choose among answers.
    """
    flags = {flag for flag in (getattr(module, "is_causal", None) for module in model.modules()) if flag is not None}
    if flags:
        return True in flags
    from transformers.models.auto import modeling_auto as auto

    if getattr(model.config, "is_encoder_decoder", False):
        return False  # an encoder of a pair, the decoder of which is gone
    name = str(getattr(model.config, "model_type", ""))
    encodes = name in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES or name in auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES
    return name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not encodes


def _name(model: object) -> str:
    return model.__name__ if isinstance(model, type) else type(model).__name__

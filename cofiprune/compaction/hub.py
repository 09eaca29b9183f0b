"""Loading compacted models by plain `from_pretrained`.

transformers lets a quantisation method change a model's skeleton before the weights are read. The method `cofiprune`
cuts the skeleton, which is built on the meta device with the original sizes, to the sizes recorded in the
configuration. The result is an ordinary model, which can be saved, trained and loaded again.

transformers has no such door in two places, which importing this module wraps: `from_config`, which builds a model
without weights, and the merging of the recorded method with a second one given to `from_pretrained`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, cast

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AutoHfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from cofiprune.adapter import adapter_for
from cofiprune.compaction.removal import Pick
from cofiprune.compaction.slicing import reshape_skeleton
from cofiprune.errors import CheckpointError, explained
from cofiprune.record import METHOD, record_of_parts, recorded_parts, recorded_sizes

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class CompactedConfig(QuantizationConfigMixin):
    """The record of a compacted model as transformers reads it from `config.json`."""

    def __init__(self, **entries: Any) -> None:
        entries.setdefault("quant_method", METHOD)
        self.quant_method = entries["quant_method"]
        self.entries = entries
        self.second: Any = None
        """The configuration of another method that `from_pretrained` was given."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return dict(self.entries)


class CompactedLoader(HfQuantizer):
    """Cuts the skeleton of a compacted model before its weights are loaded."""

    requires_calibration = False

    def __new__(cls, quantization_config: Any, **kwargs: Any) -> Any:
        """Return the quantizer of another method that was asked for, which gets the skeleton when it is cut."""
        second = getattr(quantization_config, "second", None)
        return super().__new__(cls) if second is None else _after_cutting(quantization_config, second)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        model.config.quantization_config = self.quantization_config.to_dict()
        layers = _cut(model)
        self.shapes = _shapes(model)
        found = _shapes_in(checkpoint_files or ())
        # Outside of the layers (a head for other classes, say) it is up to transformers, which may be told to go on.
        self._check({name: shape for name, shape in found.items() if name.startswith(layers)})
        if found and _picks(found) < _picks(self.shapes):  # nobody could make these up, nor would anybody notice
            raise CheckpointError(f"the weights lack {Pick.BUFFER!r} of some layers: which of their heads were kept")
        return model

    def _check(self, found: Mapping[str, tuple[int, ...]]) -> None:
        """Compare the shapes of weights with those of the skeleton, by their names in it.

        :raises CheckpointError: naming the first that differs.
        """
        for name, shape in self.shapes.items():
            if found.get(name, shape) != shape:
                raise CheckpointError(
                    f"weight {name!r} has shape {found[name]}; the recorded sizes and the configuration say {shape}"
                )

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Remove what marks the model as quantised.

        :raises CheckpointError: when weights do not have the recorded shapes; older releases of transformers do not
            check, where there is a quantisation method.
        """
        self._check(_shapes(model))
        model.config.quantization_config = self.quantization_config.to_dict()
        model.__dict__.pop("hf_quantizer", None)
        model.__dict__.pop("quantization_method", None)
        model.__dict__["is_quantized"] = False
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _cut(model: PreTrainedModel) -> tuple[str, ...]:
    """Give a model that was built of a configuration the sizes that are recorded in it, in place.

    :return: how the names of weights in the layers begin that are now of these sizes.
    """
    if _CUT in model.__dict__:
        return ()  # a part with a record of its own, built by from_config
    own, parts = recorded_sizes(model.config), recorded_parts(model.config)
    layers: list[str] = []
    if own is not None:
        structure = adapter_for(model).structure(model, dense=True)
        reshape_skeleton(model, structure, own)
        model.__dict__[_CUT] = True
        layers += [f"{path}." for path in structure.layers]
    for path, entry in parts.items():
        part = part_of(model, path)
        part.config.quantization_config = entry
        layers += [f"{path}.{each}" for each in _cut(part)]
    return tuple(layers)


_CUT = "_cofiprune_cut"


def _after_cutting(record: CompactedConfig, second: Any) -> HfQuantizer:
    """Return another method's quantizer, which cuts the skeleton first."""
    quantizer: HfQuantizer = AutoHfQuantizer.from_config(second, pre_quantized=False)
    preprocess = quantizer.preprocess_model

    def cut_first(model: PreTrainedModel, **kwargs: Any) -> Any:
        model.config.quantization_config = record.to_dict()
        _cut(model)
        model.config.quantization_config = quantizer.quantization_config
        return preprocess(model=model, **kwargs)

    def is_serializable(*args: Any, **kwargs: Any) -> bool:
        warnings.warn(
            "a configuration has room for one method: a compacted model that was quantised while it was loaded cannot "
            "be saved. Keep the folder that it was loaded from, and pass quantization_config= again.",
            stacklevel=3,
        )
        return False

    quantizer.__dict__.update(preprocess_model=cut_first, is_serializable=is_serializable)
    return quantizer


def _merged(
    cls: type[AutoHfQuantizer], quantization_config: Any, quantization_config_from_args: Any, *args: Any, **kwargs: Any
) -> Any:
    """Take a second method at loading, where transformers allows for the recorded one only."""
    entries = quantization_config if isinstance(quantization_config, Mapping) else quantization_config.to_dict()
    second = quantization_config_from_args
    if second is None or entries.get("quant_method") != METHOD or isinstance(second, CompactedConfig):
        return _stock_merge(cls, quantization_config, second, *args, **kwargs)
    config = CompactedConfig.from_dict(dict(entries))
    config.second = second
    return config


def _from_config(cls: type[PreTrainedModel], config: PretrainedConfig, **kwargs: Any) -> PreTrainedModel:
    """Build a model of a configuration, and give it the sizes of a compacted one where they are recorded.

    A model inside another one is cut with that, where the record is the whole's.
    """
    recorded = recorded_sizes(config) is not None or bool(recorded_parts(config))
    loading = isinstance(
        getattr(config, "quantization_config", None), CompactedConfig
    )  # by from_pretrained, which cuts
    if not recorded or loading or _inside.get():
        model: PreTrainedModel = stock_from_config(cls, config, **kwargs)
        return model
    with building():
        model = stock_from_config(cls, config, **kwargs)
    _cut(model)
    return model


@contextmanager
def building() -> Iterator[None]:
    """Build a model with the sizes of its configuration, and those inside it too, whatever is recorded there."""
    inside = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(inside)


_inside: ContextVar[bool] = ContextVar("inside", default=False)


def record_parts(model: PreTrainedModel) -> None:
    """Record in a model's configuration which models inside it are compacted, so that it can be saved as one.

    For a model of several in which one encoder was replaced by the result of `compact`. It then loads by plain
    `from_pretrained`.

    :raises CheckpointError: when no part is compacted, when the model is compacted itself, or when a part has lost
        hidden dimensions, because its output is read in the original width.
    """
    if recorded_sizes(model.config) is not None:
        raise CheckpointError(f"{type(model).__name__} is compacted itself; save_pretrained saves it as it is")
    parts: dict[str, PretrainedConfig] = {}
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        inside = any(path.startswith(f"{found}.") for found in parts)
        if config is None or config is model.config or inside or not hasattr(module, "base_model_prefix"):
            continue
        sizes = recorded_sizes(config)
        if sizes is None:
            continue
        if "hidden" in sizes and sizes["hidden"] < getattr(config, "hidden_size", 0):
            raise CheckpointError(
                f"{path} ({type(module).__name__}) has {sizes['hidden']} of {config.hidden_size} hidden dimensions "
                f"left; what reads its output in {type(model).__name__} is built for all of them. Leave 'hidden' out "
                "of units."
            )
        parts[path] = config
    if not parts:
        raise CheckpointError(
            f"no model inside {type(model).__name__} is compacted; put what compact() returns in the place of one "
            "first, for example model.vision_model = cofiprune.compact(model.vision_model)"
        )
    model.config.quantization_config = record_of_parts(parts)


def part_of(model: PreTrainedModel, path: str) -> PreTrainedModel:
    try:
        part: Any = model.get_submodule(path)
    except AttributeError:
        raise CheckpointError(f"sizes are recorded for {path!r}, which {type(model).__name__} does not have") from None
    return cast("PreTrainedModel", part)


def _shapes_in(files: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in safetensors files, without reading their values."""
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        if file.endswith(".safetensors"):
            with (
                explained(CheckpointError, f"{file} is damaged", SafetensorError, OSError),
                safe_open(file, "pt") as opened,
            ):
                found.update({name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()})  # noqa: SIM118
    return found


def _picks(names: Iterable[str]) -> int:
    return sum(name.rpartition(".")[2] == Pick.BUFFER for name in names)


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


_stock_merge: Any = AutoHfQuantizer.merge_quantization_configs.__func__  # type: ignore[attr-defined]
stock_from_config: Any = PreTrainedModel._from_config.__func__  # type: ignore[attr-defined]
if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(CompactedConfig)
    register_quantizer(METHOD)(CompactedLoader)
    AutoHfQuantizer.merge_quantization_configs = classmethod(_merged)  # type: ignore[method-assign,assignment]
    PreTrainedModel._from_config = classmethod(_from_config)  # type: ignore[method-assign,assignment,arg-type]

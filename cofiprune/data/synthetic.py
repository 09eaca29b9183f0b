"""Synthetic inputs of the right names, shapes and ranges for a model: for timing, and for data-free pruning."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cofiprune.data.checks import longest_sequence, vocabulary_size
from cofiprune.data.tasks import INPUTS, forward_names, main_input, task_of
from cofiprune.errors import DataError
from cofiprune.parts import encoder_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_SPECIAL = ("pad", "bos", "eos", "cls", "sep", "mask", "unk", "decoder_start")
_CHOICES = 2


def synthetic_inputs(
    model: PreTrainedModel,
    *,
    batch_size: int,
    seq_len: int = 128,
    generator: torch.Generator | None = None,
    padding: bool = False,
) -> dict[str, Tensor]:
    """Make a batch of random inputs, on the model's device, floating ones in its precision.

    Token ids leave out the special ones that the configuration names. The size of images is the
    configuration's; `seq_len` then means nothing.

    :param seq_len: tokens, or frames of audio after the model's own downsampling.
    :param generator: on the CPU; by default one with a seed of 0, so that inputs are the same every time.
    :param padding: give token rows random lengths from a quarter of `seq_len` up, padded at the end; one row is
        full. Otherwise every row is, under an attention mask of ones.
    :raises DataError: when the model cannot read `seq_len` tokens, or reads inputs of an unknown kind.
    """
    if batch_size < 1 or seq_len < 1:
        raise DataError(f"batch_size and seq_len must be at least 1, not {batch_size} and {seq_len}")
    generator = generator or torch.Generator().manual_seed(0)
    kind = main_input(model)
    if kind == "input_ids":
        inputs = _tokens(model, batch_size, seq_len, generator, padding)
    elif kind in INPUTS:
        shape = _shape(encoder_config(model), kind, seq_len)
        inputs = {kind: torch.randn(batch_size, *shape, generator=generator).to(model.dtype)}
    else:
        raise DataError(f"{type(model).__name__} reads {kind!r}; inputs can be made up for {', '.join(INPUTS)} only")
    return {name: value.to(model.device) for name, value in inputs.items()}


def ordinary_ids(model: PreTrainedModel) -> Tensor:
    """Return the ids of a model's vocabulary that its configuration does not name as special ones: [ids]."""
    size = vocabulary_size(model)
    allowed = torch.ones(size, dtype=torch.bool)
    for name in _SPECIAL:
        for value in _listed(getattr(encoder_config(model), f"{name}_token_id", None)):
            if 0 <= value < size:
                allowed[value] = False
    return allowed.nonzero().flatten() if bool(allowed.any()) else torch.arange(size)


def _tokens(
    model: PreTrainedModel, batch_size: int, seq_len: int, generator: torch.Generator, padding: bool
) -> dict[str, Tensor]:
    limit = longest_sequence(model)
    if limit is not None and seq_len > limit:
        raise DataError(f"seq_len={seq_len}: {type(model).__name__} reads at most {limit} tokens")
    choices = (_CHOICES,) if task_of(model) == "multiple-choice" else ()
    ids = ordinary_ids(model)
    shape = (batch_size, *choices, seq_len)
    tokens = ids[torch.randint(len(ids), shape, generator=generator)]
    mask = torch.ones(shape, dtype=torch.long)
    if padding:
        lengths = torch.randint(max(1, seq_len // 4), seq_len + 1, (*shape[:-1], 1), generator=generator)
        lengths[0] = seq_len
        mask = (torch.arange(seq_len) < lengths).long()
        pad = _listed(getattr(encoder_config(model), "pad_token_id", None))
        tokens = tokens.masked_fill(mask == 0, pad[0] if pad and pad[0] >= 0 else 0)
    names = forward_names(model)
    boxes = {"bbox": _boxes(model, shape, generator)} if "bbox" in names else {}
    inputs = {"input_ids": tokens, "attention_mask": mask, **boxes}
    return {name: value for name, value in inputs.items() if name in names}


def _boxes(model: PreTrainedModel, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Where tokens lie on a page: left, top, right and bottom, as entries of a table or as shares of the page."""
    config = encoder_config(model)
    boxes = torch.randint(1, 9, (*shape, getattr(config, "dim_bbox", 4)), generator=generator).sort(dim=-1).values
    return boxes if hasattr(config, "max_2d_position_embeddings") else boxes.to(model.dtype) / 10


def _shape(config: PretrainedConfig, kind: str, seq_len: int) -> tuple[int, ...]:
    """Shape of one example of images or audio."""
    if kind.startswith("pixel_values"):
        size = getattr(config, "image_size", None) or getattr(config, "crop_size", None) or 224
        height, width = size if isinstance(size, list | tuple) else (size, size)
        frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
        channels = getattr(config, "num_channels", None) or getattr(config, "in_chans", None) or 3
        return (*([frames] if frames else []), channels, height, width)
    mel = getattr(config, "num_mel_bins", None)
    if hasattr(config, "spec_size"):  # a spectrogram that is folded into an image
        return (1, config.spec_size * (config.spec_size // config.num_mel_bins), config.num_mel_bins)
    if kind == "input_values":
        if hasattr(config, "conv_stride"):
            return (_samples(config, seq_len),)
        if mel is not None and hasattr(config, "max_length"):
            return (config.max_length, mel)
    if hasattr(config, "feature_projection_input_dim"):
        return (seq_len, config.feature_projection_input_dim)
    if mel is not None and hasattr(config, "max_source_positions"):
        return (mel, 2 * config.max_source_positions)
    if mel is not None and hasattr(config, "subsampling_factor"):
        return (seq_len * config.subsampling_factor, mel)
    raise DataError(f"the {config.model_type} configuration does not say what {kind!r} look like")


def _samples(config: PretrainedConfig, frames: int) -> int:
    """Samples of sound from which strided convolutions make so many frames."""
    length = frames
    for stride, kernel in zip(reversed(config.conv_stride), reversed(config.conv_kernel), strict=True):
        length = (length - 1) * stride + kernel
    return length


def _listed(value: int | list[int] | None) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]

"""A tensor that all layers share has entries for every unit; each compacted layer picks those of its own."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import MPNetModel, PreTrainedModel

import cofiprune
from cofiprune.compaction.removal import Pick
from cofiprune.conformance.specimens import outputs
from small import batch_of, build


def kept(model: PreTrainedModel, layer: int) -> list[int] | None:
    module = model.get_submodule(f"encoder.layer.{layer}.attention.attn")
    buffer = module._buffers.get(Pick.BUFFER)
    return None if buffer is None else buffer.tolist()


def states(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    return outputs(model, batch)["last_hidden_state"]


def test_layers_pick_the_entries_of_the_heads_that_they_keep(tmp_path: Path) -> None:
    model = build("MPNetModel", num_hidden_layers=3)
    batch = batch_of(model)
    with cofiprune.attach(model, "head") as masks:
        masks["layers.0.heads"] = [0, 1, 1, 1]
        masks["layers.2.heads"] = [1, 0, 0.5, 1]
        masked = states(model, batch)
        small = cofiprune.compact(model)
    assert [kept(small, layer) for layer in range(3)] == [[1, 2, 3], None, [0, 2, 3]]
    assert [kept(model, layer) for layer in range(3)] == [None, None, None]
    assert small.encoder.relative_attention_bias.weight.shape == model.encoder.relative_attention_bias.weight.shape
    assert torch.allclose(states(small, batch), masked, atol=1e-12)

    # Cut again, in units of what is left, and once more after loading; the bias goes by the first model's heads.
    for layer, mask, expected in ((0, [0.0, 1.0, 1.0], [2, 3]), (2, [1.0, 1.0, 0.0], [0, 2])):
        with cofiprune.attach(small, "head") as masks:
            masks[f"layers.{layer}.heads"] = mask
            masked = states(small, batch)
            small = cofiprune.compact(small)
        assert kept(small, layer) == expected
        assert torch.allclose(states(small, batch), masked, atol=1e-12)
        small.save_pretrained(tmp_path)
        small = MPNetModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
        assert kept(small, layer) == expected
        assert torch.allclose(states(small, batch), masked, atol=1e-12)


def test_a_model_without_cut_heads_has_no_buffers() -> None:
    model = build("MPNetModel")
    with cofiprune.attach(model) as masks:
        masks["layers.0.attention"] = [0]
        masks["layers.1.intermediate"] = [0.0] * 4 + [1.0] * 30
        small = cofiprune.compact(model)
    assert not any(name.endswith(Pick.BUFFER) for name in small.state_dict())

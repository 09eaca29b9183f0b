"""What a layer itself holds for a block goes with the block, in memory and through a file."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BeitConfig, BeitModel

import cofiprune


def test_parameters_and_modules_that_a_layer_holds_go_with_their_block(tmp_path: Path) -> None:
    config = BeitConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=34, image_size=8, patch_size=4,
        use_relative_position_bias=True,
    )  # fmt: skip
    model = BeitModel(config).eval()
    images = torch.randn(2, 3, 8, 8)
    with cofiprune.attach(model) as masks, torch.no_grad():
        masks["layers.0.attention"] = [0]
        masks["layers.1.ffn"] = [0]
        masked = model(images).last_hidden_state
        small = cofiprune.compact(model)
    names = dict(small.named_parameters())
    assert "layers.0.lambda_1" not in names
    assert "layers.1.lambda_2" not in names
    assert small.layers[0].relative_position_bias is None
    assert {"layers.0.lambda_2", "layers.1.lambda_1"} <= names.keys()
    assert small.layers[1].relative_position_bias is not None
    small.save_pretrained(tmp_path)
    with torch.no_grad():
        for each in (small, BeitModel.from_pretrained(tmp_path).eval()):
            assert torch.allclose(each(images).last_hidden_state, masked, atol=1e-5)

"""X-MOD (Pfeiffer et al., 2022, arXiv:2205.06266): RoBERTa with an adapter for each language behind the feed-forward.

The adapters read and write the hidden dimensions and go with the feed-forward block behind which they stand: a block
that is removed hands its input on, past the adapters. A fractional gate scales the feed-forward projection alone,
since an adapter acts on the sum with the residual. The inner width of the adapters is not pruned.

Multiply-accumulates are those of one language per example.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from cofiprune.adapter import HIDDEN, INTERMEDIATE, BlockTable, Family, Weights, linear, norm, projection
from cofiprune.structure import BlockExit
from cofiprune_adapters import bert, roberta

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class XmodAdapter(roberta.RobertaAdapter):
    """X-MOD, pre-norm or post-norm, with every head that transformers has for it."""

    model_types = ("xmod",)
    test_settings = MappingProxyType({"default_language": "en_XX"})

    def describe(self, config: PretrainedConfig) -> Family:
        family = super().describe(config)
        ffn = BlockTable(
            rows=(
                linear("intermediate.dense", reads=HIDDEN, writes=INTERMEDIATE),
                projection("output.dense", reads=INTERMEDIATE),
                norm("output.LayerNorm"),
                norm("output.adapter_layer_norm", optional=True),
                *(row for place, name in enumerate(config.languages) for row in language(str(name), counted=not place)),
            ),
            exit=BlockExit("output", argument=1, keyword="input_tensor"),
            # The layer itself runs this norm, before the block or behind it.
            bypassed=("intermediate", "output.LayerNorm"),
        )
        final = (norm("encoder.LayerNorm"),) if config.pre_norm else ()
        return replace(family, stem=(*family.stem, *final), attention=bert.ATTENTION, ffn=ffn)


def language(name: str, *, counted: bool) -> tuple[Weights, Weights]:
    """The rows of one language's adapter, [hidden, bottleneck] and back; an example runs through one of them."""
    rows = (1, 0) if counted else (0, 0)
    path = f"output.adapter_modules.{name}"
    return (
        linear(f"{path}.dense1", reads=HIDDEN, rows=rows),
        linear(f"{path}.dense2", writes=HIDDEN.scaled, rows=rows),
    )


adapter = XmodAdapter()

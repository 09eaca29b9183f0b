"""X-MOD (Pfeiffer et al., 2022, arXiv:2205.06266): RoBERTa with an adapter for each language behind the feed-forward.

The adapters read and write the hidden dimensions and go with the feed-forward block behind which they stand: a block
that is removed hands its input on, past the adapters. A fractional gate scales the feed-forward projection alone,
since an adapter acts on the sum with the residual. The inner width of the adapters is not pruned.

Multiply-accumulates are those of one language per example.
"""

from dataclasses import replace

from transformers import PretrainedConfig

from cofiprune.adapter import (
    HIDDEN,
    INTERMEDIATE,
    BlockExit,
    BlockTable,
    Family,
    Weights,
    family,
    linear,
    norm,
    projection,
)
from cofiprune_adapters import roberta


@family("xmod", test_settings={"default_language": "en_XX"})
def adapter(config: PretrainedConfig) -> Family:
    plain = roberta.adapter.describe(config)
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
    return replace(plain, stem=(*plain.stem, *final), ffn=ffn)


def language(name: str, *, counted: bool) -> tuple[Weights, Weights]:
    """The rows of one language's adapter, [hidden, bottleneck] and back; an example runs through one of them."""
    rows = (1, 0) if counted else (0, 0)
    path = f"output.adapter_modules.{name}"
    return (
        linear(f"{path}.dense1", reads=HIDDEN, rows=rows),
        linear(f"{path}.dense2", writes=HIDDEN.scaled, rows=rows),
    )

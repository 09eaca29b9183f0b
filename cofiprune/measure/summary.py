"""What a model costs and what is left of its structure, next to the dense model it came from.

Every figure comes from the one table that masks, slicing and sparsity read, so that it is the number
that `sum(p.numel())` would give. A compacted model remembers the sizes it came from; the dense
structure is rebuilt from its configuration without allocating a weight.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from cofiprune import accounting
from cofiprune.accounting import amount
from cofiprune.adapter import adapter_for
from cofiprune.errors import SettingsError
from cofiprune.masking import masks_of
from cofiprune.measure.report import Report, bar, rich_table, share
from cofiprune.record import recorded_sizes
from cofiprune.structure import Structure

if TYPE_CHECKING:
    from rich.console import Group
    from transformers import PreTrainedModel

State = Literal["dense", "masked", "compacted"]
_WIDTH = 16
_FIGURES = (
    ("parameters", "parameters"),
    ("layer_parameters", "  in the encoder's layers"),
    ("embedding_parameters", "  in embedding tables"),
    ("parameters_without_embeddings", "  without embedding tables"),
    ("macs", "MACs"),
    ("layer_macs", "  in the encoder's layers"),
)


@dataclass(frozen=True)
class Size:
    """The cost of a model in one state."""

    parameters: int
    """Every parameter; tied ones count once."""
    layer_parameters: int
    """Of the encoder's layers: what `sparsity` divides by."""
    embedding_parameters: int
    """Of the embedding tables."""
    macs: int
    """Multiply-accumulates for one example of `seq_len` tokens."""
    layer_macs: int
    """Multiply-accumulates of the encoder's layers."""

    @property
    def parameters_without_embeddings(self) -> int:
        """Every parameter but those of the embedding tables."""
        return self.parameters - self.embedding_parameters


@dataclass(frozen=True)
class Kept:
    """Units of a group that are kept, of how many."""

    kept: int
    total: int

    def __str__(self) -> str:
        return f"{self.kept} of {self.total}"


@dataclass(frozen=True)
class LayerSummary:
    """The structure of one encoder layer."""

    index: int
    """From 0, over the layers of the dense model."""
    attention: bool
    """Whether the attention block is there."""
    ffn: bool
    """Whether the feed-forward block is there."""
    heads: Kept | None
    """None where the family cannot prune heads one by one."""
    intermediate: Kept | None
    """Feed-forward dimensions; None where the family cannot prune them one by one."""


@dataclass(frozen=True, repr=False)
class Summary(Report, Size):
    """Parameters, MACs and structure of a model; prints as tables, and renders in notebooks.

    The figures are those of the present model; under masks, those of what `compact` would give.
    """

    name: str
    """The model's class."""
    family: str
    seq_len: int
    """The length for which MACs are counted, in tokens."""
    state: State
    dense: Size
    """The model before anything was removed."""
    hidden: Kept | None
    """Dimensions of the residual stream; None where the family cannot prune them."""
    layers: tuple[LayerSummary, ...]

    @property
    def sparsity(self) -> float:
        """Removed share of the parameters of the encoder's layers."""
        return 1 - self.layer_parameters / self.dense.layer_parameters

    @property
    def model_sparsity(self) -> float:
        """Removed share of every parameter."""
        return 1 - self.parameters / self.dense.parameters

    def _title(self) -> str:
        state = {"dense": "", "masked": ", under masks", "compacted": ", compacted"}[self.state]
        return f"{self.name} ({self.family}){state}, MACs at {self.seq_len} tokens"

    def _result(self) -> list[str]:
        if self.state == "dense":
            return []
        return [f"sparsity {self.sparsity:.4f} of the layers, {self.model_sparsity:.4f} of the model"]

    def _figures(self) -> tuple[list[str], list[list[str]]]:
        rows = [[label, amount(getattr(self.dense, name))] for name, label in _FIGURES]
        if self.state == "dense":
            return ["", "dense"], rows
        for row, (name, _) in zip(rows, _FIGURES, strict=True):
            before, now = getattr(self.dense, name), getattr(self, name)
            row += [amount(now), share(1 - now / before) if before else "", f"{before / now:.1f}x" if now else ""]
        return ["", "dense", "if compacted" if self.state == "masked" else "now", "removed", "smaller"], rows

    def _picture(self) -> tuple[list[str], list[list[str]]]:
        rows = []
        if self.hidden is not None:
            rows.append(["hidden", _drawn(self.hidden), str(self.hidden), "", ""])
        for layer in self.layers:
            row = [f"layer {layer.index}"]
            for present, kept in ((layer.attention, layer.heads), (layer.ffn, layer.intermediate)):
                count = "removed" if not present else "kept" if kept is None else str(kept)
                row += [_drawn(kept or Kept(int(present), 1)) if present else "", count]
            rows.append(row)
        return ["kept", "attention", "heads", "feed-forward", "dimensions"], rows

    def __rich__(self) -> Group:
        from rich.console import Group

        return Group(
            self._title(), *self._result(), rich_table(*self._figures()), rich_table(*self._picture(), bars=(1, 3))
        )


def summary(model: PreTrainedModel, *, seq_len: int = 128) -> Summary:
    """Count a model's parameters and multiply-accumulates, and list what is kept of its structure.

    Under masks, it says what `compact` would give; of a compacted model, what is left of the dense one.

    :param seq_len: length for which MACs are counted: tokens, image patches or audio frames.
    :raises AdapterError: when the model's family has no adapter.
    """
    if isinstance(seq_len, bool) or not isinstance(seq_len, int) or seq_len < 1:
        raise SettingsError(f"seq_len takes a whole number of tokens of at least 1, not {seq_len!r}")
    recorded, masks = recorded_sizes(model.config), masks_of(model)
    structure = dense_structure(model)
    kept = {**structure.sizes, **(recorded or {}), **(masks.plan().kept if masks is not None else {})}
    state: State = "masked" if masks is not None else "compacted" if recorded else "dense"
    return Summary(
        name=type(model).__name__,
        family=structure.family,
        seq_len=seq_len,
        state=state,
        dense=Size(**_figures(structure, structure.sizes, seq_len)),
        **_figures(structure, kept, seq_len),
        hidden=_kept("hidden", structure, kept),
        layers=tuple(_layer(index, structure, kept) for index in range(len(structure.layers))),
    )


def dense_structure(model: PreTrainedModel) -> Structure:
    """The structure that a model had before anything was removed from it.

    :raises AdapterError: when the model's family has no adapter.
    """
    adapter = adapter_for(model)
    if recorded_sizes(model.config) is None:
        return adapter.structure(model)
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        skeleton = type(model)(config)
    return adapter.structure(skeleton, dense=True)


def _figures(structure: Structure, kept: Mapping[str, int], seq_len: int) -> dict[str, int]:
    costs = {
        "parameters": accounting.model_parameters(structure),
        "layer_parameters": accounting.layer_parameters(structure),
        "embedding_parameters": accounting.embedding_parameters(structure),
        "macs": accounting.model_macs(structure, seq_len),
        "layer_macs": accounting.layer_macs(structure, seq_len),
    }
    return {name: cost.exact(kept) for name, cost in costs.items()}


def _layer(index: int, structure: Structure, kept: Mapping[str, int]) -> LayerSummary:
    prefix = f"layers.{index}."
    return LayerSummary(
        index=index,
        attention=bool(kept.get(f"{prefix}attention", 1)),
        ffn=bool(kept.get(f"{prefix}ffn", 1)),
        heads=_kept(f"{prefix}heads", structure, kept),
        intermediate=_kept(f"{prefix}intermediate", structure, kept),
    )


def _drawn(kept: Kept) -> str:
    """A bar of a cell per unit where they are few."""
    return bar(kept.kept, kept.total, kept.total if 4 <= kept.total <= _WIDTH else _WIDTH)


def _kept(name: str, structure: Structure, kept: Mapping[str, int]) -> Kept | None:
    return Kept(kept[name], structure[name].size) if name in structure else None

"""Parameters, multiply-accumulates and structure of a model, next to the dense model that it comes from.

Every figure comes from the structure that masks, slicing and sparsity read, so that it is what `sum(p.numel())` would
give. A compacted model records the sizes it has left; the dense structure is rebuilt from its configuration without
allocating a weight.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from cofiprune import accounting
from cofiprune.accounting import amount
from cofiprune.adapter import adapter_for
from cofiprune.drawing import Picture, structure_map
from cofiprune.errors import SettingsError, names_checked
from cofiprune.masking import masks_of
from cofiprune.measure.report import Report, bar, rich_table, share
from cofiprune.record import sizes_of
from cofiprune.structure import Structure
from cofiprune.whole import inside

if TYPE_CHECKING:
    from rich.console import Group
    from transformers import PreTrainedModel

State = Literal["dense", "masked", "compacted"]
_WIDTH = 16
_FIGURES = {
    "parameters": "parameters",
    "layer_parameters": "  in the encoder's layers",
    "embedding_parameters": "  in embedding tables",
    "parameters_without_embeddings": "  without embedding tables",
    "macs": "MACs",
    "layer_macs": "  in the encoder's layers",
}


@dataclass(frozen=True)
class Size:
    """The cost of a model in one state."""

    parameters: int
    """Every parameter; tied ones count once."""
    layer_parameters: int
    """Of the encoder's layers, the denominator of `sparsity`."""
    embedding_parameters: int
    """Of the embedding tables."""
    macs: int
    """Multiply-accumulates for one example of `seq_len` tokens."""
    layer_macs: int
    """Multiply-accumulates of the encoder's layers."""

    @staticmethod
    def of(structure: Structure, kept: Mapping[str, int], seq_len: int) -> Size:
        """Count the cost of a structure with some units left, by group."""
        costs = (
            accounting.model_parameters(structure),
            accounting.layer_parameters(structure),
            accounting.embedding_parameters(structure),
            accounting.model_macs(structure, seq_len),
            accounting.layer_macs(structure, seq_len),
        )
        return Size(*(cost.exact(kept) for cost in costs))

    @property
    def parameters_without_embeddings(self) -> int:
        """Every parameter but those of the embedding tables."""
        return self.parameters - self.embedding_parameters


@dataclass(frozen=True)
class Kept:
    """The kept units of a group."""

    kept: int
    total: int

    def __str__(self) -> str:
        return f"{self.kept} of {self.total}"

    def drawn(self) -> str:
        """A bar, of one cell per unit where they are few."""
        return bar(self.kept, self.total, self.total if 4 <= self.total <= _WIDTH else _WIDTH)


@dataclass(frozen=True)
class LayerSummary:
    """The structure of one encoder layer."""

    index: int
    """From 0, over the layers of the dense model."""
    attention: bool
    """False if the attention block was removed."""
    ffn: bool
    """False if the feed-forward block was removed."""
    heads: Kept | None
    """None where the family cannot prune heads one by one."""
    intermediate: Kept | None
    """Feed-forward dimensions; None where the family cannot prune them one by one."""


@dataclass(frozen=True, repr=False)
class Summary(Report, Size):
    """Parameters, MACs and structure of a model; prints as tables, and renders in notebooks.

    The figures are those of the present model; under masks, those that `compact` would give.
    """

    name: str
    """The model's class."""
    family: str
    seq_len: int
    """The length for which MACs are counted, in tokens."""
    state: State
    dense: Size
    """Before anything was removed."""
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

    def __rich__(self) -> Group:
        from rich.console import Group

        state = {"dense": "", "masked": ", under masks", "compacted": ", compacted"}[self.state]
        lines = [f"{self.name} ({self.family}){state}, MACs at {self.seq_len} tokens"]
        if self.state != "dense":
            lines.append(f"sparsity {self.sparsity:.4f} of the layers, {self.model_sparsity:.4f} of the model")
        blocks = ["kept", "attention", "heads", "feed-forward", "dimensions"]
        return Group(*lines, rich_table(*self._figures()), rich_table(blocks, self._blocks(), bars=(1, 3)))

    def plot(self, path: str | Path | None = None) -> Picture:
        """Draw how much of every layer is kept.

        :param path: of an .svg file to write as well.
        """
        counts = {} if self.hidden is None else {"hidden": self.hidden}
        for layer in self.layers:
            blocks = {"attention": layer.attention, "ffn": layer.ffn}
            counts |= {f"layers.{layer.index}.{name}": Kept(int(there), 1) for name, there in blocks.items()}
            units = {"heads": layer.heads, "intermediate": layer.intermediate}
            counts |= {f"layers.{layer.index}.{name}": kept for name, kept in units.items() if kept is not None}
        sizes = {name: each.total for name, each in counts.items()}
        kept = {name: each.kept for name, each in counts.items()}
        picture = structure_map(sizes, kept, {name: range(count) for name, count in kept.items()})
        if path is not None:
            picture.save(path)
        return picture

    def _figures(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table of costs."""
        rows = [[label, amount(getattr(self.dense, name))] for name, label in _FIGURES.items()]
        if self.state == "dense":
            return ["", "dense"], rows
        for row, name in zip(rows, _FIGURES, strict=True):
            before, now = getattr(self.dense, name), getattr(self, name)
            row += [amount(now), share(1 - now / before) if before else "", f"{before / now:.1f}x" if now else ""]
        return ["", "dense", "if compacted" if self.state == "masked" else "now", "removed", "smaller"], rows

    def _blocks(self) -> list[list[str]]:
        """Rows of the table of kept units."""
        rows = [] if self.hidden is None else [["hidden", self.hidden.drawn(), str(self.hidden), "", ""]]
        for layer in self.layers:
            row = [f"layer {layer.index}"]
            for present, kept in ((layer.attention, layer.heads), (layer.ffn, layer.intermediate)):
                count = "removed" if not present else "kept" if kept is None else str(kept)
                row += [(kept or Kept(1, 1)).drawn() if present else "", count]
            rows.append(row)
        return rows


@names_checked
def summary(model: PreTrainedModel, *, seq_len: int = 128) -> Summary:
    """Count a model's parameters and multiply-accumulates, and list the kept units of every layer.

    Under masks, the figures are those of the model that `compact` would give.

    :param seq_len: length for which MACs are counted: tokens, image patches or audio frames.
    :raises AdapterError: when the model's family has no adapter.
    """
    if isinstance(seq_len, bool) or not isinstance(seq_len, int) or seq_len < 1:
        raise SettingsError(f"seq_len takes a whole number of tokens of at least 1, not {seq_len!r}")
    model = inside(model)
    recorded, masks = sizes_of(model), masks_of(model)
    structure = dense_structure(model)
    kept = {**structure.sizes, **(recorded or {}), **(masks.plan().kept if masks is not None else {})}

    def units(name: str) -> Kept | None:
        return Kept(kept[name], structure[name].size) if name in structure else None

    return Summary(
        name=type(model).__name__,
        family=structure.family,
        seq_len=seq_len,
        state="masked" if masks is not None else "compacted" if recorded else "dense",
        dense=Size.of(structure, structure.sizes, seq_len),
        **asdict(Size.of(structure, kept, seq_len)),
        hidden=units("hidden"),
        layers=tuple(
            LayerSummary(
                index,
                attention=bool(kept.get(f"layers.{index}.attention", 1)),
                ffn=bool(kept.get(f"layers.{index}.ffn", 1)),
                heads=units(f"layers.{index}.heads"),
                intermediate=units(f"layers.{index}.intermediate"),
            )
            for index in range(len(structure.layers))
        ),
    )


def dense_structure(model: PreTrainedModel) -> Structure:
    """Return the structure that a model had before anything was removed from it.

    :raises AdapterError: when the model's family has no adapter.
    """
    adapter = adapter_for(model)
    if sizes_of(model) is None:
        return adapter.structure(model)
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        skeleton = type(model)(config)
    return adapter.structure(skeleton, dense=True)

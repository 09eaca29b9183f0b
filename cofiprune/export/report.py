"""What an export wrote, and how each file compares with the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cofiprune.measure.report import Report, rich_table

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class ExportedFile:
    """A file of weights."""

    path: Path
    kind: str
    """"onnx" or "openvino", or one of them and "-int8"."""
    megabytes: float
    """With what belongs to it, such as the weights beside an OpenVINO model."""
    difference: float
    """Largest difference of an output from the model's, over synthetic inputs and the rows."""
    score: float
    """On the rows, by their labels where they have them; otherwise agreement with the model, 1 at best."""
    agreement: float
    """Share of rows, tokens or spans for which file and model say the same; for vectors the mean cosine."""
    note: str = ""

    def moved(self, source: Path, target: Path) -> ExportedFile:
        """Return the entry of a file after its folder was moved."""
        return replace(self, path=target / self.path.relative_to(source))


def megabytes(file: Path) -> float:
    """Return the size of a file of weights with those beside it that belong to it: of the same name before the dot."""
    parts = (part for part in file.parent.iterdir() if part.name.partition(".")[0] == file.name.partition(".")[0])
    return sum(part.stat().st_size for part in parts) / 1e6


@dataclass(frozen=True, repr=False)
class ExportReport(Report, Mapping[str, ExportedFile]):
    """The files of an export, by their paths within its folder."""

    folder: Path
    files: tuple[ExportedFile, ...]
    metric: str
    """What `score` is: a metric of the task, or "agreement"."""
    reference: float
    """The model's own score."""
    rows: int
    """Number of the user's rows; 0 where none were given and inputs were synthetic."""
    removed: tuple[str, ...] = ()
    """Files in the folder that were of another model."""

    def __getitem__(self, name: str) -> ExportedFile:
        return {file.path.relative_to(self.folder).as_posix(): file for file in self.files}[name]

    def __iter__(self) -> Iterator[str]:
        return (file.path.relative_to(self.folder).as_posix() for file in self.files)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def difference(self) -> dict[str, float]:
        """Largest difference from the model, by file."""
        return {name: file.difference for name, file in self.items()}

    @property
    def score(self) -> dict[str, float]:
        """Score, by file."""
        return {name: file.score for name, file in self.items()}

    def __rich__(self) -> RenderableType:
        from rich.console import Group

        asked = f"{self.rows:,} rows" if self.rows else "synthetic inputs"
        title = f"saved in {self.folder}, compared with the model on {asked}"
        header = ["file", "MB", "difference", self.metric, *(["agreement"] if self.metric != "agreement" else [])]
        rows = [["the model", "", "", f"{self.reference:.4f}", *(["1.0000"] if len(header) > 4 else [])]]
        for name, file in self.items():
            cells = [name, f"{file.megabytes:.1f}", f"{file.difference:.2g}", f"{file.score:.4f}"]
            rows.append([*cells, *([f"{file.agreement:.4f}"] if len(header) > 4 else [])])
        notes = [f"{name}: {file.note}" for name, file in self.items() if file.note]
        if self.removed:
            notes.append(f"removed, since of another model: {', '.join(self.removed)}")
        return Group(title, rich_table(header, rows), *notes)

"""`export`: a model as files of other runtimes, each compared with the model before it gets its name."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.data import DataLoader

from cofiprune.data.reading import Reading
from cofiprune.data.tasks import main_input
from cofiprune.errors import ExportError, SettingsError, explained, suggest
from cofiprune.export.comparison import EXAMPLE, Expected, compared_batches, example, synthetic_rows, torch_answers
from cofiprune.export.folder import holds_weights, mark_of, move, remove_others, write_beside
from cofiprune.export.graph import float_copy, write_onnx
from cofiprune.export.openvino import openvino_answers, write_openvino
from cofiprune.export.openvino_int8 import quantise_openvino
from cofiprune.export.quantisation import Quantised, check_int8, quantise_onnx
from cofiprune.export.report import ExportedFile, ExportReport, megabytes
from cofiprune.export.sessions import onnx_answers
from cofiprune.hooks import same_random_state
from cofiprune.masking import masks_of
from cofiprune.measure.answers import Answer, Scorer
from cofiprune.measure.evaluation import ComputeMetrics
from cofiprune.parts import is_transformers_model
from cofiprune.whole import SENTENCES, Whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMATS: Mapping[str, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "onnxruntime", "openvino"),
}
"""What can be written, and the packages that it takes."""
_TOLERANCE = 1e-3
"""Largest difference of an output from the model's, as a share of the largest number where that is above 1."""


def export(  # noqa: PLR0913  # a front door: its settings are flat
    model: PreTrainedModel,
    dir: str | Path,
    *,
    tokenizer: Any = None,
    format: str | Sequence[str] = ("onnx",),
    int8: bool | str = False,
    dataset: Any = None,
    max_drop: float | None = None,
    compute_metrics: ComputeMetrics | None = None,
    metric: str | None = None,
    modules: Sequence[nn.Module] = (),
    opset: int | None = None,
) -> ExportReport:
    """Write a model, dense or compacted, as files of other runtimes, and compare each with the model.

    The folder is one that hubs and servers read: `onnx/model.onnx`, `onnx/model_quantized.onnx`,
    `openvino/openvino_model.xml`, the tokenizer, and a `config.json` of the exported sizes. Files are float32 whatever
    the model's precision, and take any number of rows and of tokens; a model with more than 1.5 GB of weights has them
    in a file beside the graph. They take their names when all of them are done: after an error nothing new is there.
    Files that an earlier call left of the same model stay; under these names, those of another model are removed.

    :param model: or a SentenceTransformer, whose embedding is an output then, or a CrossEncoder. It stays as it is.
    :param dir: a folder, which may be the one where the model is saved; or a file that ends in .onnx, which is then all
        that is written.
    :param tokenizer: or processor, saved beside the files; it reads rows of text.
    :param format: "onnx" and "openvino", one or both.
    :param int8: write int8 files beside them: True for the fastest that holds `max_drop`; or "static", "dynamic"
        (ranges read off the rows, or off each batch), "weights" (products of floats).
    :param dataset: rows to compare and to score on, as in `evaluate`; without them synthetic inputs with padding.
    :param max_drop: what the score may lose by int8, as a fraction.
    :param compute_metrics: as in `evaluate`, for a score of your own, such as the F1 of entities; higher is better.
    :param metric: which of its numbers counts; may be left out where there is one.
    :param modules: that make an embedding of an encoder's states, as the modules behind the first in a
        SentenceTransformer do; the files then have a second output, `sentence_embedding`.
    :param opset: version of ONNX's operators; by default torch's own.
    :raises SettingsError: for a format that there is not, packages that are missing, or a model under masks.
    :raises DataError: when the rows do not fit the model.
    :raises ExportError: when a runtime cannot take the model, or computes something else.
    """
    target = Path(dir).expanduser()
    whole = Whole.of(model)
    tokenizer = tokenizer or (whole.tokenizer if whole.kind else None)
    check_int8(int8, dataset, max_drop)
    if (dataset is None and compute_metrics is not None) or (compute_metrics is None and metric is not None):
        raise SettingsError("compute_metrics= needs dataset=, and metric= needs compute_metrics=")
    formats = _checked(whole.model, target, format, int8)
    alone = target.suffix == ".onnx"
    folder = target.parent if alone else target
    saved = not alone and holds_weights(folder, whole.model)
    with same_random_state():
        score = {"compute_metrics": compute_metrics, "own_metric": metric}
        job = _Job.of(whole, modules, _rows(whole, tokenizer, dataset), score)
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".export-") as name:
            staged = Path(name)
            made = job.write(staged / (target.name if alone else "onnx/model.onnx"), staged, formats, opset)
            made += [job.quantised(each, int8, max_drop) for each in made if int8]
            if not alone:
                write_beside(staged, whole, tokenizer, saved=saved)
            removed = () if alone else remove_others(folder, staged, job.mark)
            move(staged, folder)
    return job.report(folder, [each.moved(staged, folder) for each in made], removed)


def _rows(whole: Whole, tokenizer: Any, dataset: Any) -> Any:
    """Return rows as the model reads them: those of text as tokens."""
    if dataset is None or isinstance(dataset, DataLoader):
        return dataset
    first = dataset[0] if hasattr(dataset, "__getitem__") and not isinstance(dataset, str) and len(dataset) else None
    if isinstance(first, Mapping) and main_input(whole.model) in first:
        return dataset
    return whole.data(Reading(tokenizer), None, dataset=dataset)[0]


@dataclass(frozen=True)
class _Job:
    """A model that is exported, and what its files are compared with."""

    model: PreTrainedModel
    whole: nn.Module
    """The model, or what makes embeddings of its states."""
    expected: Expected
    scorer: Scorer
    rows: int
    mark: str
    """In all files, to tell them from those of other models."""

    @classmethod
    def of(cls, owner: Whole, modules: Sequence[nn.Module], dataset: Any, score: Mapping[str, Any]) -> _Job:
        """Read the rows, and answer them by the model.

        :param score: what the rows are scored by, as in `Scorer.of`.
        """
        model, whole = float_copy(owner.model, modules or (owner.behind if owner.kind == SENTENCES else ()))
        reference = torch_answers(whole, model)
        with explained(ExportError, f"this {type(model).__name__} does not run on made-up inputs", Exception):
            reference(example(model, *EXAMPLE))
        rows = synthetic_rows(model) if dataset is None else dataset
        scorer = Scorer.of(model, rows, reference, **score)
        batches = compared_batches(model, None if dataset is None else scorer.batches)
        expected, count = Expected.of(reference, batches), 0 if dataset is None else len(dataset)
        return cls(model, whole, expected, scorer, count, mark_of(whole))

    def write(self, graph: Path, folder: Path, formats: Sequence[str], opset: int | None) -> list[ExportedFile]:
        """Write files and compare them.

        :param graph: the ONNX file, which others are made from; it is removed where it is not among the formats.
        """
        graph.parent.mkdir(exist_ok=True)
        write_onnx(self.whole, self.model, graph, example(self.model, *EXAMPLE), opset=opset, mark=self.mark)
        made = [self.compared(graph, "onnx", onnx_answers(graph))] if "onnx" in formats else []
        if "openvino" in formats:
            file = folder / "openvino" / "openvino_model.xml"
            file.parent.mkdir()
            write_openvino(graph, file)
            made.append(self.compared(file, "openvino", openvino_answers(file)))
        if "onnx" not in formats:
            shutil.rmtree(graph.parent)
        return made

    def compared(self, file: Path, kind: str, answer: Answer) -> ExportedFile:
        """Compare a float file with the model.

        :raises ExportError: when it computes something else.
        """
        with explained(ExportError, f"the {kind} form of this {type(self.model).__name__} does not run", Exception):
            found = self.expected.difference(answer)
        if not found <= _TOLERANCE * max(1.0, self.expected.largest):
            raise ExportError(
                f"the {kind} form of this {type(self.model).__name__} computes something else: outputs of up to "
                f"{self.expected.largest:.2g} differ by {found:.2g}; nothing was written"
            )
        score = self.scorer.score(answer)
        return ExportedFile(file, kind, megabytes(file), found, score.value, score.agreement)

    def quantised(self, source: ExportedFile, int8: bool | str, max_drop: float | None) -> ExportedFile:
        """Write the int8 form of a float file beside it.

        :raises ExportError: when it costs more than `max_drop`.
        """
        onnx = source.kind == "onnx"
        file = source.path.with_name(f"{source.path.stem}_{'' if onnx else 'qint8_'}quantized{source.path.suffix}")
        how: dict[str, Any] = {"int8": int8, "scorer": self.scorer if self.rows else None, "max_drop": max_drop}
        made: Quantised
        if onnx:
            made, answer = quantise_onnx(source.path, file, self.model, **how), onnx_answers(file)
        else:
            made, answer = quantise_openvino(source.path, file, **how), openvino_answers(file)
        score, found = self.scorer.score(answer), self.expected.difference(answer)
        kind = f"{source.kind}-int8"
        return ExportedFile(file, kind, megabytes(file), found, score.value, score.agreement, made.note)

    def report(self, folder: Path, files: Sequence[ExportedFile], removed: tuple[str, ...]) -> ExportReport:
        return ExportReport(folder, tuple(files), self.scorer.metric, self.scorer.reference.value, self.rows, removed)


def check_packages(formats: Sequence[str]) -> None:
    """Make sure that what writes and reads some formats is installed.

    :raises SettingsError: saying what to install.
    """
    missing = [name for format in formats for name in FORMATS[format] if find_spec(name) is None]
    if missing:
        extras = ",".join(["export", *(["openvino"] if "openvino" in formats else [])])
        raise SettingsError(f"export needs {' and '.join(dict.fromkeys(missing))}: pip install 'cofiprune[{extras}]'")


def _checked(model: Any, target: Path, format: str | Sequence[str], int8: bool | str) -> list[str]:
    """Return the formats, when everything can be written.

    :raises SettingsError: when it cannot, saying why.
    """
    formats = [format] if isinstance(format, str) else list(dict.fromkeys(format))
    for name in formats or [""]:
        if name not in FORMATS:
            raise SettingsError(f"unknown format {name!r}.{suggest(name, FORMATS)} One or more of {', '.join(FORMATS)}")
    if not is_transformers_model(model):
        raise SettingsError(
            f"export takes a model of transformers, or an object of sentence-transformers, not a {type(model).__name__}"
        )
    if masks_of(model) is not None:
        raise SettingsError("the model has masks: export cofiprune.compact(model)")
    if target.suffix == ".onnx" and formats != ["onnx"]:
        raise SettingsError(f"{target} is one ONNX file; name a folder for {' and '.join(formats)}")
    if "openvino" in formats and int8 == "dynamic":
        raise SettingsError("OpenVINO has no dynamic int8: int8='static', which reads ranges off rows, or 'weights'")
    if target.suffix == ".onnx" and int8:
        raise SettingsError(f"{target} is one ONNX file; name a folder for it and its int8 form")
    if target.is_file() and target.suffix != ".onnx":
        raise SettingsError(f"{target} is a file; name a folder")
    check_packages(formats)
    if int8 and "openvino" in formats and find_spec("nncf") is None:
        raise SettingsError("int8 for OpenVINO needs nncf: pip install 'cofiprune[openvino]'")
    return formats

"""What a finished run writes beside its model: the report as a page, and the card."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cofiprune.drawing import curves, structure_map
from cofiprune.measure.figures import Figures, compared
from cofiprune.measure.page import code, entries, html_table, note, page
from cofiprune.measure.report import share
from cofiprune.plan import Plan

_ENDINGS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForMultipleChoice": "multiple-choice",
    "ForImageClassification": "image-classification",
    "ForAudioClassification": "audio-classification",
}
"""Endings of classes that an AutoModel loads, and the tasks of their pipelines."""
_PACKAGES = ("cofiprune", "torch", "transformers", "accelerate")


@dataclass(frozen=True)
class Story:
    """What there is to tell of a run."""

    architecture: str
    """The model's class."""
    base_model: str
    """The model that the run began with, by its name on the hub; of a folder its last part."""
    is_folder: bool
    """Whether that is the name of a folder."""
    plan: Plan | None
    """What was kept; None where nothing was removed."""
    sparsity: float
    method: str
    sentence: str
    """What was asked for and done."""
    before: Figures | None
    after: Figures | None
    history: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    datasets: tuple[str, ...] = ()
    """Names of the training data on the hub, where they are known."""
    needs_cofiprune: bool = True
    """Whether a plain `from_pretrained` fails without the package."""
    has_code: bool = False
    """Whether the folder has modelling code, which loads it without the package."""
    kind: str | None = None
    """The class of an object of sentence-transformers; None for a model of transformers."""
    command: Sequence[str] = ()
    """The command line, where there was one."""

    @property
    def loader(self) -> str:
        """The class that loads the model."""
        return (
            self.kind or f"AutoModel{next((ending for ending in _ENDINGS if self.architecture.endswith(ending)), '')}"
        )

    @property
    def task(self) -> str:
        """The task of its pipeline."""
        if self.kind is not None:
            return {"SentenceTransformer": "sentence-similarity"}.get(self.kind, "text-ranking")
        return next((task for end, task in _ENDINGS.items() if self.architecture.endswith(end)), "feature-extraction")

    @property
    def columns(self) -> tuple[str, str, str, str]:
        """The header of the table of figures."""
        return ("", "before", "after", "") if self.plan is None else ("", "dense", "pruned", "")

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The rows of that table; none where nothing was measured."""
        return [] if self.before is None or self.after is None else compared(self.before, self.after)


def report(story: Story, name: str) -> str:
    """Return the report of a run as an HTML page.

    :param name: of the folder that it is written to.
    """
    plan, before = story.plan, story.before
    drawn = curves(story.history, {} if before is None else before.metrics, None if plan is None else story.sparsity)
    sections = {
        "Before and after": (html_table(story.columns, story.rows) + note(before.setting)) if before else "",
        "Structure": "" if plan is None else structure_map(plan.sizes, plan.kept, plan.keep).svg
        + note("Filled is kept, outlined is removed; a dotted line is a block that is not there."),
        "Curves": "" if drawn is None else drawn.svg,
        "Load it": code(_loading(story, name)),
        "Go on": code(_commands(story, name)),
        "Settings": entries(story.settings, f"all {len(story.settings)} settings, as they were used"),
        "Versions": entries({package: _version(package) for package in _PACKAGES}),
    }  # fmt: skip
    return page(f"{name}: {story.architecture}", story.sentence, _tiles(story), sections)


def card(story: Story, name: str) -> str:
    """Return the model card, a `README.md` with the header that the hub reads.

    :param name: of the folder that it is written to.
    """
    body = [f"# {name}", story.sentence]
    if story.rows:
        assert story.before is not None
        body += [_markdown(story.columns, story.rows), story.before.setting + "."]
    body.append(f"## Load it\n\n```python\n{_loading(story, name)}\n```")
    if story.needs_cofiprune:
        body.append(
            "Its layers differ in shape, which transformers does not build by itself: either `import cofiprune` comes "
            "first, and no code of this folder is run; "
            + (
                "or `trust_remote_code=True` runs the modelling code in this folder, without cofiprune."
                if story.has_code
                else "or, in a folder with modelling code, which this one has not, `trust_remote_code=True` is given."
            )
        )
    body.append(f"## How it was made\n\n`report.html` in this folder has the structure, the curves and all settings; "
                f"`plan.json` what was kept. {_versions()}")  # fmt: skip
    if story.command:
        body.append(f"```\n{shlex.join(story.command)}\n```")
    return f"---\n{_header(story, name)}\n---\n\n" + "\n\n".join(body) + "\n"


def _header(story: Story, name: str) -> str:
    """Return the card's header, which the hub reads."""
    from huggingface_hub import EvalResult, ModelCardData

    figures = story.after
    scores = {} if figures is None else {name.removeprefix("eval_"): value for name, value in figures.metrics.items()}
    scores = {name: round(value, 4) for name, value in scores.items() if name != "loss"}
    data = story.datasets[0] if story.datasets else None
    results = [
        EvalResult(
            task_type=story.task, dataset_type=data or "private", dataset_name=data or "the run's evaluation set",
            metric_type=metric, metric_value=value,
        )
        for metric, value in scores.items()
    ]  # fmt: skip
    kind = ["pruned", "structured-pruning", "cofiprune"] if story.plan is not None else ["cofiprune"]
    header = ModelCardData(
        library_name="transformers" if story.kind is None else "sentence-transformers",
        base_model=story.base_model,
        base_model_relation="finetune",
        pipeline_tag=story.task,
        tags=kind,
        metrics=list(scores) or None,
        model_name=name,
        eval_results=results or None,
        ignore_metadata_errors=False,
        datasets=list(story.datasets) or None,
    ).to_yaml()
    remark = "# base_model was a folder; name the model on the hub that it is\n" if story.is_folder else ""
    return remark + str(header).strip()


def _tiles(story: Story) -> list[tuple[str, str]]:
    """The figures that are read first."""
    before, after = story.before, story.after
    tiles = [] if story.plan is None else [(share(story.sparsity), "of the layers' parameters removed")]
    if before is None or after is None:
        return tiles
    score = next((name for name in after.metrics if name != "eval_loss"), None)
    if score is not None:
        was = f", {before.metrics[score]:.4f} before" if score in before.metrics else ""
        tiles.append((f"{after.metrics[score]:.4f}", score.removeprefix("eval_") + was))
    tiles.append((f"{after.megabytes:.1f} MB", f"of weights, {before.megabytes:.1f} MB before"))
    if before.latency_ms and after.latency_ms:
        tiles.append((f"{before.latency_ms / after.latency_ms:.1f}x", f"as fast, {after.latency_ms:.1f} ms"))
    return tiles


def _loading(story: Story, name: str) -> str:
    """Return the lines that load the model, with and without the package."""
    first = "import cofiprune  # registers the loader of compacted models\n" if story.needs_cofiprune else ""
    library, call = ("transformers", ".from_pretrained") if story.kind is None else ("sentence_transformers", "")
    line = f'model = {story.loader}{call}("{name}"'
    other = f"\n\n# without cofiprune\n{line}, trust_remote_code=True)" if story.has_code else ""
    return f"{first}from {library} import {story.loader}\n\n{line}){other}"


def _commands(story: Story, name: str) -> str:
    """Return the command of the run, and those that come next."""
    made = [f"# made by\n{shlex.join(story.command)}\n"] if story.command else []
    folder = shlex.quote(name)
    return "\n".join([
        *made,
        f"cofiprune evaluate {folder} --validation-file FILE",
        f"cofiprune benchmark {folder} --baseline {shlex.quote(story.base_model)}",
        f"cofiprune export {folder} OUT",
    ])  # fmt: skip


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *([cell.strip() for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _versions() -> str:
    return f"Made with {', '.join(f'{package} {_version(package)}' for package in _PACKAGES)}."


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout
        return "of a checkout"


def base_of(name_or_path: str) -> tuple[str, bool]:
    """Return a model's name on the hub, or the last part of its folder's, and whether it is one."""
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name_or_path) and not Path(name_or_path).exists():
        return name_or_path, False
    return re.sub(r"[^\w.-]+", "-", Path(name_or_path).name) or "unknown", True

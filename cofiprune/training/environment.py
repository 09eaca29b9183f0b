"""What a run works in: device, folder and evaluation set, checked beforehand; its progress, and signals to stop it."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, PartialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import nn

from cofiprune.data.prepare import prepare
from cofiprune.data.tasks import label_names
from cofiprune.errors import CheckpointError, DataError, SettingsError, located, one_line, suggest
from cofiprune.measure.evaluation import evaluate_batches
from cofiprune.measure.report import as_text
from cofiprune.training.checkpoint import Resume, has_checkpoints
from cofiprune.training.config import PruneConfig
from cofiprune.training.processes import by_first, check_processes, together

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Evaluate = Callable[[nn.Module], dict[str, float]]
_SHOWN = {"loss": "loss {:.2f}", "expected_sparsity": " sparsity {:.2f}", "target_sparsity": "/{:.2f}"}
_CELL_SECONDS = 0.5
"""Between two pictures of the progress in a notebook."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def accelerator_for(config: PruneConfig) -> Accelerator:
    """Set up Accelerate; a later run of the same process may ask for another precision than an earlier one.

    :raises SettingsError: for a precision that this machine does not have, and processes that work apart.
    """
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != config.mixed_precision:
        AcceleratorState._reset_state()
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise SettingsError("mixed_precision='fp16' needs a GPU; use 'bf16' or 'no' here")
    # Which parts of a model a batch uses depends on its head (an unused pooler, say).
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    # Without a GPU, Accelerate takes processes that torchrun started for single ones unless it is told the device.
    alone = not PartialState._shared_state and not torch.cuda.is_available()
    cpu = alone and int(os.environ.get("WORLD_SIZE") or 1) > 1
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=cpu, kwargs_handlers=[unused])
    check_processes(accelerator.num_processes)
    return accelerator


def check_compile(config: PruneConfig, device: torch.device) -> None:
    """Compile something small, where the settings ask for compiled training steps.

    :raises SettingsError: when the backend is unknown, or cannot work on this machine.
    """
    if not config.torch_compile:
        if config.torch_compile_backend != "inductor":
            raise SettingsError("torch_compile_backend says what compiles, and needs torch_compile=True")
        return
    known = torch.compiler.list_backends(exclude_tags=())
    if config.torch_compile_backend not in known:
        near = suggest(config.torch_compile_backend, known)
        raise SettingsError(
            f"unknown torch_compile_backend {config.torch_compile_backend!r}.{near} Choose among {', '.join(known)}"
        )
    try:
        smallest = torch.compile(lambda values: values.sin().sum(), backend=config.torch_compile_backend)
        smallest(torch.ones(2, device=device, requires_grad=True))
    except Exception as error:
        needed = "Triton" if device.type == "cuda" else "a C++ compiler such as g++"
        reason = " ".join(str(error).split("\n")[:2]).strip()
        raise SettingsError(
            f"torch_compile=True does not work here ({reason}); its default backend needs {needed}"
        ) from error


def check_output_dir(output_dir: str | Path | None, *, resume: Resume) -> Path | None:
    """Make sure that checkpoints can be written, and that none of another run are in the way; make the folder.

    :raises SettingsError: when files cannot be written there, or it is missing where a run is to be resumed.
    :raises CheckpointError: when a new run would mix its checkpoints with those of an earlier one.
    """
    if output_dir is None:
        if resume:
            raise SettingsError(f"resume={resume} needs the output_dir that holds the checkpoints")
        return None
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"output_dir={str(output_dir)!r} is a file; it takes a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SettingsError(f"output_dir={str(output_dir)!r} cannot be written to: {one_line(error)}") from error
    if not resume and has_checkpoints(folder):
        raise CheckpointError(
            f"{folder} holds checkpoints of an earlier run: pass resume=True to go on with that run, or choose "
            "another output_dir, or delete them"
        )
    return folder


def check_callbacks(callbacks: Any) -> tuple[Callable[[dict[str, Any]], None], ...]:
    """Return the callbacks as a tuple.

    :raises SettingsError: for anything that cannot be called.
    """
    found = tuple(callbacks) if isinstance(callbacks, Iterable) else (callbacks,)
    wrong = next((item for item in found if not callable(item)), None)
    if wrong is not None:
        raise SettingsError(f"callbacks takes functions that are called with each entry of the history, not {wrong!r}")
    return found


def held_out(
    model: PreTrainedModel,
    dataset: Any,
    config: PruneConfig,
    collator: Callable[[list[Any]], Any] | None,
    compute_metrics: Callable[[Any], dict[str, float]] | None,
) -> Evaluate | None:
    """Return what evaluates a model on the checked evaluation set; None without one.

    :raises DataError: when it does not fit the model, or there is nothing to measure.
    """
    if dataset is None:
        return None
    size, name = config.eval_batch_size, "eval_dataset"
    batches = prepare(dataset, model, batch_size=size, collator=collator, need_labels=False, name=name)
    if not batches.labelled and compute_metrics is None:
        expected = " and ".join(map(repr, label_names(model))) or "labels (it has no head)"
        raise DataError(
            f"eval_dataset: there is nothing to measure: {type(model).__name__} takes {expected}, and the rows have "
            "none that count. Pass a compute_metrics, or leave the set out"
        )

    def evaluate(trained: nn.Module) -> dict[str, float]:
        # All take part, so that none waits for long; what the user's function returns is the same on all of them.
        computed = compute_metrics if PartialState().is_main_process else None
        found: dict[str, float] = {}
        with together(), located("eval_dataset: "):
            found = evaluate_batches(trained, batches, compute_metrics=computed)  # type: ignore[arg-type]
        found = by_first(lambda: found)
        return {name if name.startswith("eval_") else f"eval_{name}": value for name, value in found.items()}

    return evaluate


def metric_name(metric: str, values: Iterable[str], setting: str = "metric_for_best_model") -> str:
    """Return the name under which an evaluation gives a metric, with or without the prefix `eval_`.

    :param setting: that asks for it.
    :raises SettingsError: when it gives no such metric.
    """
    found = next((name for name in values if name in (metric, f"eval_{metric}")), None)
    if found is None:
        known = [name.removeprefix("eval_") for name in values if name.startswith("eval_")]
        raise SettingsError(
            f"{setting}={metric!r} is not among the metrics of the evaluation: {', '.join(known)}."
            f"{suggest(metric, known)} compute_metrics can add others"
        )
    return found


class Display(Progress):
    """A line for each phase with loss, expected and target sparsity, metric and time left; it fits into 80 columns.

    In a terminal rich draws it. A notebook shows it as text in one place, for which it needs no widgets.
    """

    task: TaskID

    def __init__(self, *, enabled: bool) -> None:
        console = Console(stderr=True)
        notebook = "ipykernel" in sys.modules
        super().__init__(
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TextColumn("{task.fields[info]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not (enabled and console.is_terminal and not notebook),
        )
        self._figures = dict.fromkeys((*_SHOWN, "metric"), "")
        self._phases: dict[str, TaskID] = {}
        self._cell = _Cell() if enabled and notebook else None

    def begin(self, phase: str, *, total: int | None, done: int) -> None:
        """Start the line of a phase, or go on with it."""
        if phase not in self._phases:
            self._phases[phase] = self.add_task(phase, total=total, info="")
        self.task = self._phases[phase]
        self.reach(done)

    def reach(self, done: int) -> None:
        """Show that so many steps of the phase are done."""
        self.update(self.task, completed=done)
        if self._cell is not None:
            self._cell.show(self, at_once=self.finished)

    def show(self, entry: Mapping[str, Any]) -> None:
        """Show the figures of a history entry; those that it does not have stay until the next entry with a loss."""
        for name, text in _SHOWN.items():
            if name in entry or "loss" in entry:
                self._figures[name] = text.format(entry[name]) if name in entry else ""
        metric = next((name for name in entry if name.startswith("eval_") and name != "eval_loss"), None)
        if metric is not None:
            self._figures["metric"] = f" {metric.removeprefix('eval_')} {entry[metric]:.3f}"
        self.update(self.task, info="".join(self._figures.values()))


class _Cell:
    """A place in a notebook's output whose text is replaced, twice a second at most."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._shown = 0.0

    def show(self, progress: Progress, *, at_once: bool) -> None:
        """Show what there is of a progress."""
        now = time.monotonic()
        if not at_once and now - self._shown < _CELL_SECONDS:
            return
        from IPython.display import display

        self._shown, data = now, {"text/plain": as_text(progress.make_tasks_table(progress.tasks))}
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)


class Interrupt:
    """While it is entered, the first signal only sets `requested`; a second one acts at once."""

    def __init__(self) -> None:
        self.requested: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Signal handlers can be set in the main thread only; elsewhere signals act as they always do.
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and scripts leave it for background jobs
                    self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python
        self._previous.clear()
        if kind is None and self.requested is not None:
            signal.raise_signal(self.requested)  # it came when there was no step left to stop after

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            raise KeyboardInterrupt
        self.requested = number

    def stop(self, message: str) -> None:
        """Raise what the signal stands for: KeyboardInterrupt, or SystemExit for SIGTERM."""
        if self.requested == signal.SIGTERM:
            raise SystemExit(f"stopped by SIGTERM. {message}")
        raise KeyboardInterrupt(message)

"""What stands beside a model in its folder and has to come along: processors, modules of sentence-transformers.

A sentence-transformers folder is an encoder and a list of modules that read its states: how they are pooled, normalised
and projected, what is written before a text. Without these the encoder loads as another model, of pooled means.
"""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cofiprune.cli.options import UsageError
from cofiprune.errors import CheckpointError, explained
from cofiprune.files import write_json
from cofiprune.record import recorded_sizes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_MODULES = "modules.json"
_SENTENCE = (_MODULES, "config_sentence_transformers.json", "sentence_*_config.json")
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")
_WRITTEN = (
    "config.json", "plan.json", "point.json", "result.json", "trainer_state.json", "*.index.json",
    "modeling_*_compacted.py",
)  # fmt: skip
"""What a run writes itself, and what tells of weights and runs other than its own."""
_TOKENIZER = ("tokenizer*.json", "vocab.*", "merges.txt", "*_tokens*.json", "*.model", "chat_template*")
_WEIGHTS = (".safetensors", ".bin", ".pt")
_WIDTHS = ("embedding_dimension", "word_embedding_dimension")


@dataclass(frozen=True)
class Beside:
    """What stands beside a model."""

    source: Path | None
    """Its folder; None for a model on the hub that cannot be reached."""
    modules: tuple[tuple[str, str], ...]
    """Of a sentence-transformers folder: the modules behind the encoder, by the paths of their folders and kinds."""
    left: tuple[str, ...] = _WRITTEN
    """Patterns of files that do not come along."""

    @classmethod
    def of(cls, name: str) -> Beside:
        """Find it.

        :param name: a directory, or a name on the hub, from where it is fetched.
        :raises CheckpointError: when the list of modules cannot be read.
        """
        folder = Path(name).expanduser()
        source = folder if folder.is_dir() else _fetched(name)
        return cls(source, () if source is None else tuple((path, kind) for path, kind in _listed(source) if path))

    @property
    def pools(self) -> bool:
        """Whether the model makes embeddings, whatever class its encoder was saved from."""
        return any(kind == "Pooling" for _, kind in self.modules)

    @property
    def pools_first(self) -> bool:
        """Whether the vector of a text is the state of its first token."""
        files = [(self.source or Path()) / path / "config.json" for path, kind in self.modules if kind == "Pooling"]
        stated = [_read(file) for file in files if file.is_file()]
        return any(each.get("pooling_mode") == "cls" or each.get("pooling_mode_cls_token") is True for each in stated)

    @property
    def readers(self) -> list[str]:
        """Modules with weights, which read as many hidden dimensions as the encoder has now."""
        source = self.source or Path()
        held = {path: {file.suffix for file in (source / path).glob("*")} for path, _ in self.modules}
        return [f"{kind} ({path})" for path, kind in self.modules if not held[path].isdisjoint(_WEIGHTS)]

    def refuse_a_part(self) -> None:
        """Refuse the folder of an encoder within the folder that lists what reads its states.

        :raises UsageError: saying what to name instead.
        """
        if self.source is not None and self.source.resolve().name in dict(_listed(self.source.resolve().parent)):
            raise UsageError(apart(self.source.resolve().parent))

    def for_task(self, task: str, stated: str | None, *, tokenised: bool) -> Beside:
        """Return what comes along with a model of a task: what reads an encoder's states not with another head.

        :param stated: the task that the model was saved for.
        :param tokenised: the tokenizer is written anew.
        """
        left = (*self.left, *(_TOKENIZER if tokenised else ()))
        if not self.modules or task in ("feature-extraction", "masked-lm", stated):
            return replace(self, left=left)
        warnings.warn(
            f"{self.source} is a model of sentence-transformers; its modules do not come along for {task}. To prune "
            "the embeddings: --task feature-extraction",
            UserWarning,
            stacklevel=3,
        )
        return replace(self, modules=(), left=(*left, *_SENTENCE))

    def copy_to(self, folder: Path, config: PretrainedConfig) -> None:
        """Write it beside a model that is saved already; files that are there are left.

        :param config: of that model, whose width the pooling is told.
        """
        if self.source is None:
            return
        for file in sorted({file for pattern in _COPIED for file in self.source.glob(pattern)}):
            if not any(file.match(pattern) for pattern in self.left) and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
        width = (recorded_sizes(config) or {}).get("hidden", getattr(config, "hidden_size", None))
        for path, _ in self.modules:
            if (self.source / path).is_dir():  # what has no settings may have no folder
                shutil.copytree(self.source / path, folder / path, dirs_exist_ok=True)
            file = folder / path / "config.json"
            settings = _read(file) if file.is_file() else {}
            stated = {name: width for name in _WIDTHS if name in settings}
            if settings != settings | stated:
                write_json(file, settings | stated, indent=4)


def apart(folder: Path) -> str:
    """A sentence about a sentence-transformers folder in which the encoder has a folder of its own."""
    return (
        f"{folder} is a model of sentence-transformers whose encoder has a folder of its own. Write it anew by "
        f'SentenceTransformer("{folder}").save_pretrained(OTHER), and name OTHER'
    )


def _listed(source: Path) -> list[tuple[str, str]]:
    """Return the modules of a sentence-transformers folder, by path and kind; none of another one."""
    file = source / _MODULES
    modules = _read(file) if file.is_file() else []
    with explained(CheckpointError, f"{file} lists no modules of sentence-transformers", LookupError, TypeError):
        listed = [(str(module["path"]), str(module["type"]).rpartition(".")[2]) for module in modules]
    for path, _ in listed:
        if not (source / path).resolve().is_relative_to(source.resolve()):
            raise CheckpointError(f"{file} names {path!r}, which is outside of its folder")
    return listed


def _read(file: Path) -> Any:
    with explained(CheckpointError, f"{file} cannot be read", OSError, ValueError):
        return json.loads(file.read_text(encoding="utf-8"))


def _fetched(name: str) -> Path | None:
    """Fetch what stands beside a model on the hub: no weights but those of its modules."""
    from huggingface_hub import snapshot_download
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(name, _MODULES, _raise_exceptions_for_missing_entries=False)
        paths = [path for path, _ in _listed(Path(found).parent) if path] if found else []
        return Path(snapshot_download(name, allow_patterns=[*_COPIED, *(f"{path}/*" for path in paths)]))
    except OSError as error:
        warnings.warn(
            f"what stands beside {name} on the hub cannot be fetched, and does not come along: {error}",
            UserWarning,
            stacklevel=3,
        )
        return None

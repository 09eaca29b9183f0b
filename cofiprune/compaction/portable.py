"""`save_pretrained` of a compacted model writes the file by which its folder loads without this package.

transformers has no door there: importing this module wraps the method. What the file is, `modelling` says.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from cofiprune.compaction.modelling import WRITER, ModellingFile, modelling_file
from cofiprune.errors import CofipruneError
from cofiprune.files import write
from cofiprune.record import recorded_parts, recorded_sizes

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _file_for(model: PreTrainedModel, portable: bool | None) -> ModellingFile | None:
    """The file to write beside a compacted model; None for none, which is an error where one is asked for."""
    if portable is False:
        return None
    try:
        return modelling_file(model)
    except CofipruneError:
        if portable:
            raise
        return None


@contextlib.contextmanager
def _mapped(config: PretrainedConfig, file: ModellingFile | None) -> Iterator[None]:
    """Let a configuration name a file while it is written, and no other one of this package."""
    before = config.__dict__.get("auto_map")
    found = {auto: name for auto, name in (before or {}).items() if not _is_ours(name)}
    found |= {} if file is None else file.auto_map
    config.__dict__.pop("auto_map", None)
    if found:
        config.auto_map = found
    try:
        yield
    finally:
        config.__dict__.pop("auto_map", None)
        if before is not None:
            config.auto_map = before


def _is_ours(name: Any) -> bool:
    return isinstance(name, str) and re.search(r"(^|--)modeling_\w+_compacted\.\w+$", name) is not None


def _write(folder: Path, file: ModellingFile | None) -> None:
    """Write the file of a folder, or remove an earlier one that belongs to other weights."""
    for found in folder.glob("modeling_*_compacted.py"):
        if (file is None or found.name != file.name) and WRITER in found.read_text(encoding="utf-8")[:200]:
            found.unlink()
    if file is not None:
        write(folder / file.name, lambda partial: partial.write_text(file.source, encoding="utf-8"))


@functools.wraps(PreTrainedModel.save_pretrained)
def _save_pretrained(
    self: PreTrainedModel, save_directory: Any, *args: Any, portable: bool | None = None, **kwargs: Any
) -> Any:
    """Save as transformers does; beside a compacted model, the file by which it loads without this package.

    :param portable: False leaves the file out; True is an error where it cannot be written, and None goes on without.
    """
    config = self.config
    compacted = recorded_sizes(config) is not None or bool(recorded_parts(config))
    if not compacted or getattr(self, "_hf_peft_config_loaded", False):
        return _stock_save(self, save_directory, *args, **kwargs)
    file = _file_for(self, portable)
    push = file is not None and kwargs.pop("push_to_hub", False)
    with _mapped(config, file):
        result = _stock_save(self, save_directory, *args, **kwargs)
    if Path(save_directory).is_dir() and (args[0] if args else kwargs.get("is_main_process", True)):
        _write(Path(save_directory), file)
        if push:  # transformers would push before the file is there
            names = ("commit_message", "private", "token", "create_pr", "tags")
            repo_id = kwargs.get("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, **{name: kwargs[name] for name in names if name in kwargs})
    return result


_stock_save: Any = PreTrainedModel.save_pretrained
PreTrainedModel.save_pretrained = _save_pretrained  # type: ignore[method-assign]

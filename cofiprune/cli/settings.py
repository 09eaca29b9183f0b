"""The fields of `PruneConfig` as options: names, kinds, defaults and help are read off the model itself."""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import textwrap
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from cofiprune.training.config import PruneConfig

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

PRESETS = ("glue-small", "glue-large", "squad")
_PLACEHOLDERS: Mapping[Any, str] = {int: "N", float: "X", str: "NAME"}
# Settings of gates, of which a training without them has none, and of what follows them.
_OF_GATES = (
    "pre_finetune_epochs", "sparsity_warmup_epochs", "freeze_epochs", "gate_learning_rate", "units",
    "target_seq_len", "target_batch_size", "latency_cache", "round_to", "uniform",
    "gate_temperature", "gate_stretch", "warm_start", "warm_start_spread", "finetune_batch_size",
    "method", "time_budget", "repair",
)  # fmt: skip
# `finetune` reads the plain names as those of its own training.
_OF_FINETUNE = {
    "epochs": ("finetune_epochs", "Epochs of training."),
    "learning_rate": ("finetune_learning_rate", "Peak of the learning rate."),
    "lr_scheduler_type": ("finetune_lr_scheduler_type", "Course of the learning rate."),
}


def add_prune_settings(parser: argparse.ArgumentParser) -> None:
    """Add an option for every field."""
    group = parser.add_argument_group("settings (fields of PruneConfig; None is spelled none)")
    texts = field_docs()
    for name, field in PruneConfig.model_fields.items():
        _add(group, name, field, texts.get(name))


def add_finetune_settings(parser: argparse.ArgumentParser) -> None:
    """Add an option for every field that training without gates reads."""
    group = parser.add_argument_group("settings (fields of PruneConfig; None is spelled none)")
    fields, texts = PruneConfig.model_fields, field_docs()
    own = {source for source, _ in _OF_FINETUNE.values()}
    for name, field in fields.items():
        if name in _OF_FINETUNE:
            source, text = _OF_FINETUNE[name]
            _add(group, name, fields[source], text)
        elif name not in _OF_GATES:
            _add(group, name, field, argparse.SUPPRESS if name in own else texts.get(name))


def prune_config(options: argparse.Namespace, preset: str | None) -> PruneConfig:
    """The configuration of `prune` that the command line gives, on top of a preset.

    :raises SettingsError: for a value out of range.
    """
    settings = _given(options)
    return PruneConfig.preset(preset, **settings) if preset else PruneConfig.create(**settings)


def finetune_config(options: argparse.Namespace) -> PruneConfig:
    """The configuration of `finetune` that the command line gives.

    :raises SettingsError: for a value out of range.
    """
    settings = _given(options)
    for name, (source, _) in _OF_FINETUNE.items():
        if name in settings:
            settings[source] = settings.pop(name)
    return PruneConfig.create(**settings)


def _given(options: argparse.Namespace) -> dict[str, Any]:
    given = vars(options)
    return {name: _read(given[name], field) for name, field in PruneConfig.model_fields.items() if name in given}


def field_docs() -> dict[str, str]:
    """The text under each field of `PruneConfig`, on one line; fields without one are left out."""
    found = {name: field.description for name, field in PruneConfig.model_fields.items() if field.description}
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(PruneConfig))).body
    except OSError:  # installed without its source
        return found
    body = tree.body if isinstance(tree, ast.ClassDef) else []
    for entry, after in itertools.pairwise(body):
        documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name) and documented:
            found.setdefault(entry.target.id, " ".join(str(after.value.value).split()))  # type: ignore[attr-defined]
    return found


def _add(group: argparse._ArgumentGroup, name: str, field: FieldInfo, text: str | None) -> None:
    option = f"--{name.replace('_', '-')}"
    kind = _kind(field)
    if text is not argparse.SUPPRESS:
        text = f"{text or ''} (default: {_shown(field.default)})".strip().replace("%", "%%")
    settings: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text}
    parts = get_args(kind)
    if kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    elif get_origin(kind) is Literal:
        settings["metavar"] = "{" + ",".join(map(str, parts)) + "}"
    elif get_origin(kind) is tuple and parts[-1] is Ellipsis:
        settings.update(nargs="+", metavar="{" + ",".join(map(str, get_args(parts[0]))) + "}")
    elif get_origin(kind) is tuple:
        settings.update(nargs=len(parts), metavar="X")
    else:
        settings["metavar"] = _PLACEHOLDERS[kind]
    group.add_argument(option, **settings)


def _read(value: Any, field: FieldInfo) -> Any:
    """What was typed, as the field takes it: lists may be joined by commas, and None is a word."""
    if isinstance(value, list):
        value = [part for text in value for part in text.split(",") if part]
    empty = value in ("none", "None", ["none"], ["None"])
    return None if empty and NoneType in _members(field.annotation) else value


def _kind(field: FieldInfo) -> Any:
    return next(member for member in _members(field.annotation) if member is not NoneType)


def _members(annotation: Any) -> list[Any]:
    """The types that an annotation allows, without constraints."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [annotation]


def _shown(default: Any) -> str:
    if isinstance(default, bool) or default is None:
        return {True: "on", False: "off", None: "none"}[default]
    if isinstance(default, tuple):
        return " ".join(map(_shown, default))
    return f"{default:.4g}" if isinstance(default, float) else str(default)

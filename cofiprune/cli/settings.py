"""The fields of the settings models as options: names, kinds, defaults and help are read off the models."""

from __future__ import annotations

import argparse
from collections.abc import Container, Iterable, Mapping
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from cofiprune.training.config import FINETUNE, RECOVERY, PruneConfig, names_of

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

_PLACEHOLDERS: Mapping[Any, str] = {int: "N", float: "X", str: "NAME"}


def add_prune_settings(parser: argparse.ArgumentParser) -> None:
    """Add an option for every field."""
    _add_settings(parser, names_of(PruneConfig))


def add_finetune_settings(parser: argparse.ArgumentParser) -> None:
    """Add an option for every field that training without gates reads; of two that mean the same, one is shown."""
    _add_settings(parser, names_of(*FINETUNE), hidden=RECOVERY)


def _add_settings(parser: argparse.ArgumentParser, names: Iterable[str], hidden: Container[str] = ()) -> None:
    group = parser.add_argument_group("settings (fields of PruneConfig; None is spelled none)")
    for name in names:
        _add(group, name, PruneConfig.model_fields[name], hidden=name in hidden)


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line gives, by name."""
    given = vars(options)
    return {name: _read(given[name], field) for name, field in PruneConfig.model_fields.items() if name in given}


def prune_config(options: argparse.Namespace, preset: str | None) -> PruneConfig:
    """The configuration of `prune` that the command line gives, on top of a preset.

    :raises SettingsError: for a value out of range.
    """
    settings = given_settings(options)
    return PruneConfig.preset(preset, **settings) if preset else PruneConfig.create(**settings)


def _add(group: argparse._ArgumentGroup, name: str, field: FieldInfo, *, hidden: bool) -> None:
    option = f"--{name.replace('_', '-')}"
    kind = _kind(field)
    text = f"{' '.join((field.description or '').split())} (default: {_shown(field.default)})".replace("%", "%%")
    settings: dict[str, Any] = {
        "dest": name,
        "default": argparse.SUPPRESS,
        "help": argparse.SUPPRESS if hidden else text,
    }
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

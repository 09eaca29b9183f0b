"""Find the settings of a configuration that state the sizes of a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cofiprune.errors import AdapterError
from cofiprune.structure import Kind

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_PREFERRED = ("hidden_size", "num_attention_heads", "intermediate_size", "num_key_value_heads")


@dataclass(frozen=True)
class Settings:
    """Units by kind, and the expressions that give them for a configuration."""

    units: Mapping[Kind, int]
    expressions: Mapping[Kind, str]
    """Python expressions in `config`."""
    query_heads: int | None = None
    """The number of query heads, if groups of them share keys and values; `units["heads"]` counts the groups then."""
    query_expression: str | None = None

    def of(self, config: PretrainedConfig) -> Settings:
        """The same for another configuration of the family."""
        units = {kind: _value(config, text) for kind, text in self.expressions.items()}
        query = None if self.query_expression is None else _value(config, self.query_expression)
        return Settings(units, self.expressions, query, self.query_expression)


def find_settings(config: PretrainedConfig, hidden: int, width: int, intermediate: int, narrow: int) -> Settings:
    """Find which settings of a configuration give the sizes that were seen.

    :param width: elements of all query heads.
    :param narrow: elements of all key heads.
    :raises AdapterError: when no setting gives the number of heads.
    """

    def named(words: Collection[str], without: Collection[str], fits: Callable[[int], bool]) -> str | None:
        """`config.NAME` for the setting whose name has one of some words and whose value fits."""
        found = [
            name
            for name in dict.fromkeys([*config.attribute_map, *vars(config)])
            if any(word in name for word in words)
            and not any(word in name for word in without)
            and not name.startswith("_")
            and type(getattr(config, name, None)) is int
            and fits(getattr(config, name))
        ]
        found.sort(key=lambda name: (name not in _PREFERRED, len(name)))
        return f"config.{found[0]}" if found else None

    heads = named(["head"], ["key_value", "kv", "dim", "size", "decoder"], lambda n: n > 0 and width % n == 0)
    if heads is None:
        raise AdapterError(f"its configuration does not say how many heads its {width} attention dimensions make up")
    count = _value(config, heads)
    keys = None
    if narrow < width and narrow * count % width == 0:
        keys = named(["key_value", "kv"], ["dim", "size"], lambda n: n == narrow * count // width)
    expressions: dict[Kind, str] = {
        "hidden": named(["hidden", "d_model", "dim", "embed"], [], lambda n: n == hidden) or str(hidden),
        "heads": keys or heads,
        "intermediate": named([""], ["vocab"], lambda n: n == intermediate) or _ratio(config, intermediate),
    }
    units = {kind: _value(config, text) for kind, text in expressions.items()}
    return Settings(units, expressions, count if keys else None, heads if keys else None)


def _ratio(config: PretrainedConfig, size: int) -> str:
    for name, value in vars(config).items():
        if "ratio" in name and isinstance(value, int | float) and int(config.hidden_size * value) == size:
            return f"int(config.hidden_size * config.{name})"
    return str(size)


def _value(config: PretrainedConfig, text: str) -> int:
    """The value of an expression that `find_settings` made."""
    if text.isdigit():
        return int(text)
    names = text.replace("int(", "").rstrip(")").split(" * ")
    return int(math.prod(getattr(config, name.removeprefix("config.")) for name in names))

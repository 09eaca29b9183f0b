"""Text, terminal and notebook forms of reports: tables, bars and numbers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

_EIGHTHS = " ▏▎▍▌▋▊▉"
_WIDTH = 80
"""Columns that text is wrapped to; a table that needs more has them."""
_PAGE = '<pre style="font-family:monospace;line-height:1.2;overflow-x:auto">{code}</pre>'


class Report:
    """A report that shows the same figures as text, in a terminal and in a notebook: those of its `__rich__`."""

    def __rich__(self) -> RenderableType:
        raise NotImplementedError

    def __str__(self) -> str:
        return as_text(self.__rich__())

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return _printed(self.__rich__()).export_html(inline_styles=True, code_format=_PAGE)


def as_text(renderable: RenderableType) -> str:
    """Render with rich into plain text without colours."""
    lines = [line.rstrip() for line in _printed(renderable).export_text().splitlines()]
    shown = [line for n, line in enumerate(lines) if line or (n and lines[n - 1])]
    return "\n".join(shown).strip("\n")


def _printed(renderable: RenderableType) -> Console:
    """A console with the record of what was printed on it, as wide as the widest word and table need."""
    from rich.console import Console

    # Inside Jupyter rich would display at once, and record nothing, unless it is told not to.
    console = Console(
        file=io.StringIO(), record=True, width=10 * _WIDTH, force_jupyter=False, markup=False, highlight=False
    )
    console.width = max(_WIDTH, console.measure(renderable).minimum)
    console.print(renderable)
    return console


def rich_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, bars: Sequence[int] = ()) -> Table:
    """Return a table for a terminal: the first column and bars to the left, figures to the right."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column, name in enumerate(header):
        justify: Literal["left", "right"] = "left" if column == 0 or column in bars else "right"
        table.add_column(name, justify=justify, no_wrap=True, style="cyan" if column in bars else "")
    for row in rows:
        table.add_row(*row)
    return table


def entries_table(rows: Sequence[Sequence[str]]) -> Table:
    """Return a table of names and values without a header, indented under a title."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for row in rows:
        table.add_row("", *row)
    return table


def bar(part: float, whole: float, width: int = 12) -> str:
    """Draw a share as a bar of `width` characters; more than nothing shows at least a sliver.

    >>> bar(3, 12, width=8), bar(0, 12, width=4), bar(1, 1000, width=4)
    ('██······', '····', '▏···')
    """
    eighths = round(8 * width * part / whole) if whole else 0
    if part > 0:
        eighths = max(1, eighths)
    full, rest = divmod(min(eighths, 8 * width), 8)
    drawn = "█" * full + (_EIGHTHS[rest] if rest else "")
    return drawn.ljust(width, "·")


def share(value: float) -> str:
    """Write a share in percent.

    >>> share(0.9487), share(0)
    ('94.9 %', '0.0 %')
    """
    return f"{100 * value:.1f} %"

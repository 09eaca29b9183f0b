"""Plain text, terminal and notebook forms of the reports: bars, numbers and tables."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_EIGHTHS = " ▏▎▍▌▋▊▉"
_WIDTH = 110
_CELL = "padding:1px 10px;border:0;background:none;text-align:"
_MONO = "font-family:monospace;white-space:pre"


def bar(part: float, whole: float, width: int = 12) -> str:
    """Draw a share as a bar of `width` characters; what is more than nothing shows at least a sliver.

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


def as_text(renderable: RenderableType) -> str:
    """Render with rich into plain text without colours."""
    from rich.console import Console

    file = io.StringIO()
    console = Console(file=file, width=_WIDTH, color_system=None, legacy_windows=False)
    console.print(renderable)
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    shown = [line for n, line in enumerate(lines) if line or (n and lines[n - 1])]
    return "\n".join(shown).strip("\n")


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


def html_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,), mono: Sequence[int] = ()
) -> str:
    """Return an HTML table; text is escaped.

    :param left: columns that are aligned to the left; the others are to the right.
    :param mono: columns of bars.
    """

    def cell(tag: str, column: int, text: str) -> str:
        style = _CELL + ("left" if column in left else "right")
        if column in mono and tag == "td":
            style += f";{_MONO}"
        return f'<{tag} style="{style}">{_escaped(text)}</{tag}>'

    body = [
        "<tr>" + "".join(cell(tag, column, text) for column, text in enumerate(row)) + "</tr>"
        for tag, row in [("th", header), *(("td", row) for row in rows)]
    ]
    return f'<table style="border-collapse:collapse;margin:6px 0">{"".join(body)}</table>'


def _escaped(text: str) -> str:
    indent = len(text) - len(text.lstrip(" "))
    return "&emsp;" * (indent // 2) + html.escape(text.lstrip(" "))


def html_report(title: str, *parts: str) -> str:
    """Put tables and sentences under a title; what is not a table is escaped."""
    shown = (part if part.startswith("<table") else f"<div>{html.escape(part)}</div>" for part in parts)
    return f"<div><strong>{html.escape(title)}</strong>{''.join(shown)}</div>"

"""A report as one HTML file: no scripts, no requests, light and dark as the reader's system is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from cofiprune.drawing import STYLE

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{title}</title><style>
:root{{color-scheme:light dark;--ink:#1f2328;--soft:#59636e;--line:#d1d9e0;--back:#fff;--card:#f6f8fa;--good:#0072B2}}
@media(prefers-color-scheme:dark){{:root{{--ink:#e6e8eb;--soft:#9aa4af;--line:#3a424b;--back:#0f1318;--card:#181d24;
--good:#56B4E9}}}}
*{{box-sizing:border-box}}
body{{margin:0 auto;padding:2rem 1.25rem 4rem;max-width:860px;background:var(--back);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}}
h1{{font-size:1.5rem;margin:0 0 .25rem}}h2{{font-size:1.1rem;margin:2.2rem 0 .6rem}}p{{margin:.4rem 0}}
.soft{{color:var(--soft)}}
.tiles{{display:flex;flex-wrap:wrap;gap:.75rem;margin:1.2rem 0}}
.tile{{flex:1 1 140px;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.7rem .9rem}}
.tile b{{display:block;font-size:1.35rem;font-variant-numeric:tabular-nums}}
.tile span{{color:var(--soft);font-size:.85rem}}
table{{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}}
th,td{{padding:.35rem .6rem;border-bottom:1px solid var(--line);text-align:right}}
th{{font-weight:600;color:var(--soft)}}th:first-child,td:first-child{{text-align:left;white-space:pre}}
.wide td{{text-align:left;vertical-align:top;word-break:break-word}}
pre{{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.8rem 1rem;
overflow-x:auto;font-size:13px}}
details summary{{cursor:pointer;color:var(--soft)}}svg{{display:block}}
{style}</style></head><body>
{body}
</body></html>
"""


def page(title: str, told: str, tiles: Sequence[tuple[str, str]], sections: Mapping[str, str]) -> str:
    """Return a page.

    :param told: one sentence under the title.
    :param tiles: the figures that are read first, and what they are.
    :param sections: HTML by heading; those that are empty are left out.
    """
    boxes = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in tiles
    )
    parts = [f"<h1>{escape(title)}</h1><p class='soft'>{escape(told)}</p><div class='tiles'>{boxes}</div>"]
    parts += [f"<h2>{escape(heading)}</h2>\n{content}" for heading, content in sections.items() if content]
    return _PAGE.format(title=escape(title), style=STYLE, body="\n".join(parts))


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of figures."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def entries(values: Mapping[str, Any], summary: str = "") -> str:
    """Return a table of names and values, folded away under a summary where there is one."""
    lines = "".join(
        f"<tr><td>{escape(str(name))}</td><td>{escape(_shown(value))}</td></tr>" for name, value in values.items()
    )
    table = f'<table class="wide"><tbody>{lines}</tbody></table>'
    return f"<details><summary>{escape(summary)}</summary>{table}</details>" if summary else table


def code(text: str) -> str:
    """Return lines of a program or a shell."""
    return f"<pre>{escape(text)}</pre>"


def note(text: str) -> str:
    """Return a sentence in a soft colour."""
    return f'<p class="soft">{escape(text)}</p>'


def _shown(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)

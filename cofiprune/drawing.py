"""Pictures as SVG text, without a plotting package: what is kept of a structure, and the curves of a run.

Their colours are told apart by people with any colour vision (Okabe and Ito, 2008), and by shape as well; text and
lines have a colour for light surroundings and one for dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from cofiprune.errors import SettingsError
from cofiprune.files import write

STYLE = """
.cofi{color:#1f2328;background:#fff;max-width:100%;height:auto}
.cofi{font:13px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
.cofi text{fill:currentColor}.cofi .dim{fill-opacity:.72}
.cofi .gone{fill:currentColor;fill-opacity:.07;stroke:currentColor;stroke-opacity:.35}
.cofi .rule{stroke:currentColor;stroke-opacity:.16}
.cofi .none{stroke:currentColor;stroke-opacity:.55;stroke-dasharray:2 4}
.cofi .heads,.cofi circle.a{fill:#0072B2}.cofi .widths{fill:#D55E00}.cofi .hidden{fill:#009E73}
.cofi path.a{stroke:#0072B2}.cofi path.b{stroke:#D55E00}
@media(prefers-color-scheme:dark){.cofi{color:#e6e8eb;background:#0f1318}
.cofi .heads,.cofi circle.a{fill:#56B4E9}.cofi .widths{fill:#E69F00}.cofi .hidden{fill:#2BC48A}
.cofi path.a{stroke:#56B4E9}.cofi path.b{stroke:#E69F00}}
"""
"""Blue, vermillion and bluish green; lighter ones where it is dark. The ground is painted, because a notebook or a
viewer may be light where the system is dark."""
_WIDTH = 760


@dataclass(frozen=True, repr=False)
class Picture:
    """An SVG picture; a notebook shows it, `save` writes it."""

    svg: str
    """The picture, without its style sheet, which is `STYLE`."""

    def save(self, path: str | Path) -> None:
        """Write the picture.

        :param path: of a file that ends in .svg.
        :raises SettingsError: for another ending.
        """
        place = Path(path)
        if place.suffix.lower() != ".svg":
            raise SettingsError(f"{place.name}: pictures are written as .svg, which browsers show and convert")
        place.parent.mkdir(parents=True, exist_ok=True)
        head, _, rest = self.svg.partition(">")
        text = f'{head} xmlns="http://www.w3.org/2000/svg"><style>{STYLE}</style>{rest}'
        write(place, lambda partial: partial.write_text(text, encoding="utf-8"))

    def __repr__(self) -> str:
        return f"Picture({len(self.svg):,} characters of SVG; save(path) writes them)"

    def _repr_html_(self) -> str:
        return f"<style>{STYLE}</style>{self.svg}"


_PARTS = {
    "blocks": (".attention", ".ffn"),
    "heads": (".heads",),
    "feed-forward": (".intermediate",),
    "hidden": ("hidden",),
}


def counted(sizes: Mapping[str, int], kept: Mapping[str, int] | None = None) -> str:
    """Say how many units there are of each kind, and how many of them are kept.

    :param sizes: units by group; `kept` likewise.

    >>> counted({"layers.0.heads": 12, "layers.1.heads": 12}, {"layers.0.heads": 3, "layers.1.heads": 0})
    '3 of 24 heads'
    """
    told = []
    for part, endings in _PARTS.items():
        names = [name for name in sizes if name.endswith(endings)]
        left = "" if kept is None else f"{sum(kept[name] for name in names):,} of "
        told += [f"{left}{sum(sizes[name] for name in names):,} {part}"] if names else []
    return ", ".join(told)


def structure_map(
    sizes: Mapping[str, int],
    kept: Mapping[str, int] | None = None,
    keep: Mapping[str, Sequence[int]] | None = None,
) -> Picture:
    """Draw a row for each layer: its heads one by one, its feed-forward dimensions as a bar.

    :param sizes: units of every group before; `kept` after, and `keep` their indices: by default all.
    """
    kept = sizes if kept is None else kept
    keep = {name: range(size) for name, size in sizes.items()} if keep is None else keep
    layers = sorted({int(name.split(".")[1]) for name in sizes if name.startswith("layers.")})
    parts, y = [], 20
    if "hidden" in sizes:
        parts += [_text(66, y + 12, "hidden", "end"), *_bar(78, y, 572, 15, kept["hidden"], sizes["hidden"], "hidden")]
        y += 34
    parts += [_text(78, y + 8, "attention heads", weight=600), _text(390, y + 8, "feed-forward dimensions", weight=600)]
    for layer in layers:
        y += 24
        parts.append(_text(66, y + 12, f"layer {layer}", "end"))
        parts += _heads(y, f"layers.{layer}", sizes, keep)
        parts += _widths(y, f"layers.{layer}", sizes, kept)
    removed = [name for name, size in sizes.items() if name.endswith((".attention", ".ffn")) and not kept[name]]
    told = f"{len(layers)} layers; {len(removed)} blocks are removed"
    return Picture(_svg(y + 40, "Structure: what is kept and what is removed", told, parts))


def _heads(y: int, layer: str, sizes: Mapping[str, int], keep: Mapping[str, Sequence[int]]) -> list[str]:
    """The heads of a layer, each a cell; a dotted line where the block is gone."""
    name, block = f"{layer}.heads", f"{layer}.attention"
    if not (keep.get(block, (0,)) and keep.get(name, (0,))):
        return [_rule(78, y + 7.5, 290), _text(346, y + 12, "removed", "end", "dim")]
    if name not in sizes:
        return _bar(78, y, 210, 15, 1, 1, "heads", "kept") if block in sizes else []
    count, there = sizes[name], set(keep[name])
    step = min(18.0, 236 / count)
    side = step - min(3.0, step / 4)
    cells = [
        f'<rect class="{"heads" if head in there else "gone"}" x="{78 + head * step:.1f}" y="{y}" width="{side:.1f}" '
        f'height="15" rx="2"/>'
        for head in range(count)
    ]
    return [*cells, _text(82 + count * step, y + 12, f"{len(there)} of {count}", kind="dim")]


def _widths(y: int, layer: str, sizes: Mapping[str, int], kept: Mapping[str, int]) -> list[str]:
    """The feed-forward dimensions of a layer, as a bar."""
    name, block = f"{layer}.intermediate", f"{layer}.ffn"
    if not (kept.get(block, 1) and kept.get(name, 1)):
        return [_rule(390, y + 7.5, 690), _text(748, y + 12, "removed", "end", "dim")]
    if name not in sizes:
        return _bar(390, y, 270, 15, 1, 1, "widths", "kept") if block in sizes else []
    return _bar(390, y, 270, 15, kept[name], sizes[name], "widths")


def _bar(
    x: float, y: float, width: float, height: float, part: int, whole: int, kind: str, told: str = ""
) -> list[str]:
    filled = max(width * part / whole, 1.5) if part else 0.0
    return [
        f'<rect class="gone" x="{x}" y="{y}" width="{width}" height="{height}" rx="2"/>',
        f'<rect class="{kind}" x="{x}" y="{y}" width="{filled:.1f}" height="{height}" rx="2"/>',
        _text(x + width + 8, y + 12, told or f"{part:,} of {whole:,}", kind="dim"),
    ]


Points = Sequence[tuple[float, float]]
_MARKED = 40
"""Largest number of points that are each marked."""


def curves(
    history: Sequence[Mapping[str, Any]], before: Mapping[str, float], sparsity: float | None = None
) -> Picture | None:
    """Draw the loss, the metric and the sparsity of a run over its steps; None where it has no steps.

    :param before: metrics of the model before the run, as a line to compare with.
    :param sparsity: that the run has ended with; None where it removed nothing.
    """
    last = max((entry["step"] for entry in history), default=0)
    if not last:
        return None
    charts: list[tuple[str, list[tuple[str, str, Points]], float | None]] = []
    charts.append(("training loss", [("", "a", _points(history, "loss"))], None))
    metric = next((name for entry in history for name in entry if is_score(name)), None)
    if metric is not None:
        charts.append((metric.removeprefix("eval_"), [("now", "a", _points(history, metric))], before.get(metric)))
    asked = _points(history, "target_sparsity")
    if sparsity is not None:
        reached = [*_points(history, "expected_sparsity", "sparsity"), (last, sparsity)]
        lines: list[tuple[str, str, Points]] = [("reached", "a", reached)]
        if asked:
            lines.append(("target", "b", [*asked, (last, asked[-1][1])]))
        charts.append(("sparsity", lines, None))
    parts: list[str] = []
    charts = [chart for chart in charts if chart[1][0][2]]
    steps = {step: f"step {step:,}" for step in (0, round(last / 2), last)}
    for number, (title, drawn, level) in enumerate(charts):
        parts += _chart(20 + number * 190, title, drawn, level, steps)
    told = ", ".join(title for title, _, _ in charts)
    return Picture(_svg(20 + 190 * len(charts), "Curves of the run", f"{told}, over optimiser steps", parts))


def trade_off(title: str, axes: Mapping[str, Sequence[float]], values: Sequence[float], level: float | None) -> Picture:
    """Draw one figure of several models over others of theirs, a chart for each of these.

    :param title: of the figure; `values` are those of the models, in an order that a line may follow.
    :param axes: places of the models by what they are measured in, `sparsity` or `ms` for example.
    :param level: the figure of the model that they come from.
    """
    parts: list[str] = []
    for number, (unit, places) in enumerate(axes.items()):
        end = 1.0 if unit == "sparsity" else _ticks(0.0, max(places))[1]
        marks = {share * end: f"{share * end:.3g} {unit}" for share in (0.0, 0.5, 1.0)}
        points = [("", "a", tuple(zip(places, values, strict=True)))]
        parts += _chart(20 + number * 190, title, points, level, marks)
    return Picture(_svg(20 + 190 * len(axes), "Models of a sweep", f"{title} over {', '.join(axes)}", parts))


def is_score(name: str) -> bool:
    """Whether an entry of the history is a metric, and no loss or time."""
    return name.startswith("eval_") and not any(part in name for part in ("loss", "runtime", "per_second", "examples"))


def _points(history: Sequence[Mapping[str, Any]], *names: str) -> list[tuple[float, float]]:
    """Return the steps and values of the entries that have one of some names, the first that there is."""
    found = [(entry["step"], next((entry[name] for name in names if name in entry), math.nan)) for entry in history]
    return [(step, value) for step, value in found if math.isfinite(value)]


def _chart(
    top: float, title: str, lines: Sequence[tuple[str, str, Points]], level: float | None, marks: Mapping[float, str]
) -> list[str]:
    """Draw one chart: a title, two axes with ticks, a line for each row of points, and a level to compare with.

    :param marks: places on the axis from 0 to its end, and what is written there.
    """
    left, right, height, last = 66.0, 650.0, 130.0, max(marks)
    values = [value for _, _, points in lines for _, value in points] + ([] if level is None else [level])
    low, high, ticks = (0.0, 1.0, [0, 0.25, 0.5, 0.75, 1]) if title == "sparsity" else _ticks(min(values), max(values))

    def at(step: float, value: float) -> tuple[float, float]:
        return left + (right - left) * step / last, top + 20 + height * (high - value) / (high - low)

    parts, ends = [_text(left, top + 8, title, weight=600)], []
    for tick in ticks:
        y = at(0, tick)[1]
        parts += [
            f'<path class="rule" d="M{left} {y:.1f}H{right}"/>',
            _text(left - 8, y + 4, f"{tick:g}", "end", "dim"),
        ]
    for place, told in marks.items():
        parts.append(_text(at(place, low)[0], top + height + 40, told, "middle", "dim"))
    if level is not None:
        ends.append(("before", at(last, level)))
        parts.append(f'<path class="none" fill="none" d="M{left} {ends[0][1][1]:.1f}H{right}"/>')
    for name, kind, points in lines:
        drawn = [at(step, value) for step, value in points]
        dashes = ' stroke-dasharray="7 4"' if kind == "b" else ""
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in drawn)
        parts.append(f'<path class="{kind}" fill="none" stroke-width="2"{dashes} d="M{path}"/>')
        if len(drawn) <= _MARKED and kind == "a":
            parts += [f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in drawn]
        ends.append((name, (right, drawn[-1][1])))
    return parts + _labels([end for end in ends if end[0]])


def _labels(ends: Sequence[tuple[str, tuple[float, float]]]) -> list[str]:
    """Name lines at their ends, one below the other where these are close."""
    parts, before = [], -math.inf
    for name, (x, y) in sorted(ends, key=lambda end: end[1][1]):
        before = max(y + 4, before + 15)
        parts.append(_text(x + 8, before, name))
    return parts


def _ticks(low: float, high: float) -> tuple[float, float, list[float]]:
    """Return round limits around two values, and round values between them."""
    if high == low:
        low, high = low - (abs(low) / 10 or 0.1), high + (abs(high) / 10 or 0.1)
    raw = (high - low) / 4
    size = 10 ** math.floor(math.log10(raw))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first * step, last * step, [round(index * step, 12) for index in range(first, last + 1)]


def _svg(height: float, title: str, told: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="cofi" viewBox="0 0 {_WIDTH} {height:g}" width="{_WIDTH}" height="{height:g}" role="img" '
        f'aria-label="{escape(title)}: {escape(told)}">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "", weight: int = 400) -> str:
    bold = "" if weight == 400 else f' font-weight="{weight}"'
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}{bold}>{escape(text)}</text>'


def _rule(x: float, y: float, end: float) -> str:
    return f'<path class="none" fill="none" d="M{x} {y}H{end - 62}"/>'

"""A chart with two vertical axes over the same columns: bars for the left one, a dashed line with dots for the right one.

Bars and line differ in shape, not only in colour, so the chart can be read in grey.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from megatron_ft.report.curves import round_steps, short

WIDTH, HEIGHT = 520, 250  # SVG coordinates; the browser scales the figure
LEFT, RIGHT, TOP, BOTTOM = 62, 62, 14, 46
_BAR = 0.56  # of a column's width

COLOURS = {"a": "#2563c9", "b": "#d9730d", "ink": "#1d2126", "soft": "#667079", "line": "#e3e5e8", "bg": "#ffffff"}
"""Those of the page's light style, for a figure in a file of its own."""


@dataclass(frozen=True)
class Axis:
    """A vertical axis. name: with its unit. top: where it ends, so that several charts share a scale; default: the largest value."""

    name: str
    values: Sequence[float | None]
    """One for each column; None leaves it empty."""
    top: float | None = None

    @property
    def end(self) -> float:
        highest = (
            self.top if self.top is not None else max((value for value in self.values if value is not None), default=0)
        )
        return 1.08 * highest or 1.0


def chart(title: str, columns: Sequence[str], below: str, left: Axis, right: Axis) -> str:
    """Return the figure as an SVG element. columns: their names; below: the name of the horizontal axis."""
    parts = [
        f'<rect class="ground" width="{WIDTH}" height="{HEIGHT}"/>',
        *_ticks(left, LEFT, grid=True), *_ticks(right, WIDTH - RIGHT, grid=False),
        *(_bar(n, len(columns), name, value, left) for n, (name, value) in enumerate(zip(columns, left.values, strict=True))),
        _line(columns, right),
        f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}V{TOP}"/>',
        *(_text(_middle(n, len(columns)), HEIGHT - BOTTOM + 17, name) for n, name in enumerate(columns)),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, below), _upright(14, left.name), _upright(WIDTH - 8, right.name),
    ]  # fmt: skip
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def figure(title: str, svg: str, left: Axis, right: Axis) -> str:
    """Return the chart with its title and legend, for a page."""
    return (
        f'<figure><figcaption><b style="flex-basis:100%">{escape(title)}</b><span class="key bars">{escape(left.name)}</span>'
        f'<span class="key b dashed">{escape(right.name)}</span></figcaption>{svg}</figure>'
    )


def standalone(title: str, svg: str, left: Axis, right: Axis) -> str:
    """Return the chart as the text of an SVG file, with its title, legend and colours."""
    head = 42
    inner = re.sub(r"^<svg[^>]*>", "", svg).removesuffix("</svg>")
    c = COLOURS
    style = (
        f"text{{font:11.5px system-ui,'DejaVu Sans',sans-serif;fill:{c['soft']}}}.name{{font-size:13.5px;font-weight:600;fill:{c['ink']}}}"
        f".ground{{fill:{c['bg']}}}.grid{{stroke:{c['line']}}}.axis{{stroke:{c['soft']};fill:none}}"
        f".column{{fill:{c['a']};fill-opacity:.3;stroke:{c['a']}}}.line.b{{stroke:{c['b']};stroke-width:1.8;fill:none}}"
        f".dashed{{stroke-dasharray:6 4}}.dot.b{{fill:{c['b']}}}"
    )
    middle = LEFT + 190
    legend = (
        f'<text class="name" x="{LEFT}" y="18">{escape(title)}</text><rect class="column" x="{LEFT}" y="28" width="14" height="9"/>'
        f'<text x="{LEFT + 20}" y="37">{escape(left.name)}</text><path class="line b dashed" d="M{middle} 33h28"/>'
        f'<circle class="dot b" r="3.5" cx="{middle + 14}" cy="33"/><text x="{middle + 34}" y="37">{escape(right.name)}</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT + head}" width="{2 * WIDTH}">'
        f'<style>{style}</style><rect class="ground" width="{WIDTH}" height="{HEIGHT + head}"/>{legend}'
        f'<g transform="translate(0 {head})">{inner}</g></svg>\n'
    )


def _middle(number: int, count: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (number + 0.5) / count


def _y(value: float, axis: Axis) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / axis.end


def _ticks(axis: Axis, x: float, grid: bool) -> list[str]:
    side, anchor = (x - 7, "end") if grid else (x + 7, "start")
    found = []
    for value in round_steps(0, axis.end, 5):
        y = _y(value, axis)
        if grid:
            found.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        found.append(_text(side, y + 4, short(value), anchor))
    return found


def _bar(number: int, count: int, name: str, value: float | None, axis: Axis) -> str:
    if value is None:
        return ""
    width = _BAR * (WIDTH - LEFT - RIGHT) / count
    y = _y(value, axis)
    return (
        f'<rect class="column" x="{_middle(number, count) - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" '
        f'height="{HEIGHT - BOTTOM - y:.1f}"><title>{escape(f"{name}, {axis.name}: {short(value)}")}</title></rect>'
    )


def _line(columns: Sequence[str], axis: Axis) -> str:
    points = [
        (_middle(n, len(columns)), _y(value, axis), name, value)
        for n, (name, value) in enumerate(zip(columns, axis.values, strict=True))
        if value is not None
    ]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y, _, _ in points)
    dots = (
        f'<circle class="dot b" r="3.5" cx="{x:.1f}" cy="{y:.1f}"><title>{escape(f"{name}, {axis.name}: {short(value)}")}</title></circle>'
        for x, y, name, value in points
    )
    return (f'<path class="line b dashed" d="M{path}"/>' if points else "") + "".join(dots)


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _upright(x: float, text: str) -> str:
    y = (TOP + HEIGHT - BOTTOM) / 2
    return f'<text x="{x}" y="{y}" text-anchor="middle" transform="rotate(-90 {x} {y})">{escape(text)}</text>'

"""One figure with the same curve of several runs. Lines differ in colour and in dashes, so that they can be told apart in grey."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from megatron_ft.report.curves import Scale, log_ticks, names_of, round_steps, short

Points = Sequence[tuple[float, float]]  # (step or tokens, value), in order

WIDTH, HEIGHT = 520, 270  # SVG coordinates; the browser scales the figure
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 12, 44
_STYLES = 6  # those of the page's style sheet
_POINTS = 500  # largest number of points drawn of a line
_HOVER = 40  # number of points of a line that show their value under the mouse


def overlay(title: str, lines: Sequence[tuple[str, Points]], across: str, up: str) -> str:
    """Return a figure with a logarithmic vertical axis. across, up: names of the axes, with units. Empty lines keep their style."""
    shown = [(number, name, _drawable(points)) for number, (name, points) in enumerate(lines)]
    everything = [point for _, _, points in shown for point in points]
    if not everything:
        return ""
    scale = _Area.of(everything)
    parts = [*_grid(scale), *(_line(scale, *line) for line in shown if line[2]), *_names(across, up)]
    return (
        f'<figure><figcaption><b>{escape(title)}</b></figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def legend(names: Sequence[str]) -> str:
    """Return the legend of all figures with these lines."""
    keys = (
        f'<span><svg viewBox="0 0 34 9"><path class="line {style(number)}" d="M0 4.5H34"/></svg>{escape(name)}</span>'
        for number, name in enumerate(names)
    )
    return f'<div class="runs">{"".join(keys)}</div>'


def style(number: int) -> str:
    """Return the class of a line by its number. Styles repeat after the sixth."""
    return f"n{number % _STYLES + 1}"


class _Area(Scale):
    """A scale with logarithmic values and this figure's size."""

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]], log: bool = True) -> _Area:
        values = [math.log10(value) for _, value in points]
        low, high = min(values), max(values)
        room = 0.05 * (high - low) or 0.05
        return cls(min(at for at, _ in points), max(at for at, _ in points), low - room, high + room, log)

    def x(self, at: float) -> float:
        if self.last == self.first:  # one place, in the middle
            return (LEFT + WIDTH - RIGHT) / 2
        return LEFT + (WIDTH - LEFT - RIGHT) * (at - self.first) / (self.last - self.first)

    def y(self, value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (self.high - math.log10(value)) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Return round values for the vertical axis."""
        return log_ticks(self.low, self.high)


def _grid(scale: _Area) -> list[str]:
    foot, parts = HEIGHT - BOTTOM, []
    values = scale.ticks()
    for value, name in zip(values, names_of(values), strict=True):
        y = scale.y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{name}</text>')
    for at in round_steps(scale.first, max(scale.last, scale.first + 1), 5):
        if scale.first <= at <= scale.last:
            parts.append(f'<text x="{scale.x(at):.1f}" y="{foot + 17}" text-anchor="middle">{short(at)}</text>')
    return [*parts, f'<path class="axis" d="M{LEFT} {TOP}V{foot}H{WIDTH - RIGHT}"/>']


def _names(across: str, up: str) -> list[str]:
    middle = TOP + (HEIGHT - TOP - BOTTOM) / 2
    return [
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(across)}</text>',
        f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(up)}</text>',
    ]


def _line(scale: _Area, number: int, name: str, points: Points) -> str:
    path = "L".join(f"{scale.x(at):.1f} {scale.y(value):.1f}" for at, value in _thinned(points, _POINTS))
    if len(points) == 1:
        path += "m-6 0h12"  # a run of one step is a short line
    hover = "".join(
        f'<circle class="hover" r="7" cx="{scale.x(at):.1f}" cy="{scale.y(value):.1f}">'
        f"<title>{escape(name)}, {short(at)}: {short(value)}</title></circle>"
        for at, value in _thinned(points, _HOVER)
    )
    return f'<path class="line {style(number)}" d="M{path}"/>{hover}'


def _thinned(points: Points, most: int) -> list[tuple[float, float]]:
    return [*points[: -1 : max(1, -(-len(points) // most))], points[-1]]


def _drawable(points: Points) -> list[tuple[float, float]]:
    return [(at, value) for at, value in points if math.isfinite(value) and value > 0]

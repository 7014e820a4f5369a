"""Line charts as SVG text. No library is used: a run's report needs only axes, lines and marks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from megatron_ft.report.metrics import Curve

WIDTH, HEIGHT = 520, 238  # SVG coordinates; the browser scales the figure
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 48
_POINTS = 400  # largest number of points drawn of a line
_HOVER = 60  # number of points of a line that show their value under the mouse


@dataclass(frozen=True)
class Line:
    """One line. dots: also draw a dot for every value, for lines with few values (evaluations)."""

    name: str
    points: Curve
    style: str = "a"
    dots: bool = False


def picture(title: str, lines: Sequence[Line], log: bool = False, marks: Sequence[int] = ()) -> str:
    """Return a figure with a title. log: logarithmic values. marks: iterations with a vertical line (checkpoints)."""
    lines = [Line(line.name, _finite(line.points, log), line.style, line.dots) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    scale = Scale.of([point for line in lines for point in line.points], log)
    parts = [_grid(scale), *(_mark(scale, at) for at in marks), *(_line(scale, line) for line in lines)]
    legend = "".join(f'<span class="key {line.style}">{escape(line.name)}</span>' for line in lines)
    if marks:
        legend += '<span class="key mark">checkpoint</span>'
    return (
        f'<figure style="max-width:620px"><figcaption><b>{escape(title)}</b>{legend}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def bars(rows: Sequence[tuple[str, float, str]]) -> str:
    """Return horizontal bars. rows: (name, length, text at its end)."""
    longest = max((length for _, length, _ in rows), default=0) or 1
    return "".join(
        f'<div class="bar"><span>{escape(name)}</span><em><i style="width:{100 * length / longest:.1f}%"></i></em>'
        f"<span>{escape(text)}</span></div>"
        for name, length, text in rows
    )


@dataclass(frozen=True)
class Scale:
    """Converts iterations and values to coordinates."""

    first: float
    last: float
    low: float
    high: float
    log: bool

    @classmethod
    def of(cls, points: Curve, log: bool) -> "Scale":
        iterations = [at for at, _ in points]
        values = [math.log10(value) if log else value for _, value in points]
        low, high = min(values), max(values)
        if not log and low >= 0:
            low = 0.0
        if high - low < 1e-12:
            low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
        room = 0.05 * (high - low)
        return cls(min(iterations), max(iterations), low if low == 0 and not log else low - room, high + room, log)

    def x(self, at: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (at - self.first) / ((self.last - self.first) or 1)

    def y(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return TOP + (HEIGHT - TOP - BOTTOM) * (self.high - value) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Return round values for the vertical axis."""
        if not self.log:
            return round_steps(self.low, self.high, 4)
        return log_ticks(self.low, self.high)


def log_ticks(low: float, high: float) -> list[float]:
    """Return round values of a logarithmic axis: powers of ten, others between them where they are few, equal steps over a small range.

    low, high: logarithms of its ends.
    """
    powers = range(math.floor(low), math.ceil(high) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5)):
        found = [digit * 10.0**power for power in powers for digit in digits]
        found = [value for value in found if low <= math.log10(value) <= high]
        if len(found) > 3:
            return found
    return round_steps(10**low, 10**high, 5)


def round_steps(low: float, high: float, about: int) -> list[float]:
    """Return about so many round numbers between two values."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= raw)
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _grid(scale: Scale) -> str:
    parts, values = [], scale.ticks()
    for value, name in zip(values, names_of(values), strict=True):
        y = scale.y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{name}</text>')
    ends = {round(at): None for at in round_steps(scale.first, max(scale.last, scale.first + 1), 5)}
    for at in ends:
        if scale.first <= at <= scale.last:
            parts.append(
                f'<text x="{scale.x(at):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{short(at)}</text>'
            )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 8}" text-anchor="middle">iteration</text>')
    return "".join(parts) + f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'


def _line(scale: Scale, line: Line) -> str:
    shown = line.points[:: max(1, len(line.points) // _POINTS)]
    if shown[-1] != line.points[-1]:
        shown = [*shown, line.points[-1]]
    path = "L".join(f"{scale.x(at):.1f} {scale.y(value):.1f}" for at, value in shown)
    dots = line.points if line.dots else []
    hover = line.points[:: max(1, len(line.points) // _HOVER)]
    return f'<path class="line {line.style}" d="M{path}"/>' + "".join(
        [
            *(f'<circle class="dot {line.style}" r="3.5" {_place(scale, *point)}/>' for point in dots),
            *(
                f'<circle class="hover" r="7" {_place(scale, *point)}>'
                f"<title>{escape(line.name)}, iteration {point[0]}: {short(point[1])}</title></circle>"
                for point in hover
            ),
        ]
    )


def _place(scale: Scale, at: int, value: float) -> str:
    return f'cx="{scale.x(at):.1f}" cy="{scale.y(value):.1f}"'


def _mark(scale: Scale, at: int) -> str:
    x = scale.x(at)
    return f'<path class="mark" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"><title>checkpoint at {at}</title></path>'


def _finite(points: Curve, log: bool) -> Curve:
    return [(at, value) for at, value in points if math.isfinite(value) and (value > 0 or not log)]


def names_of(values: Sequence[float]) -> list[str]:
    """Return a text for each value of an axis, all different."""
    names = [short(value) for value in values]
    return names if len({*names}) == len(names) else [f"{value:g}" for value in values]


def short(value: float) -> str:
    """Return a short form for an axis: 0.00031 -> 3.1e-4, 1200 -> 1.2k."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1000:
        return f"{value / 1e3:.3g}k"
    if size >= 0.01 or size == 0:
        return f"{value:.3g}"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"

"""A chart of several models by length: a line each, with its own dashes and marks, so that they can be told apart in grey."""

from collections.abc import Mapping, Sequence
from html import escape

from megatron_ft.report.marks import mark, shortened, stroke

WIDTH, HEIGHT = 720, 300  # SVG units
LEFT, RIGHT, TOP, BOTTOM = 56, 216, 14, 46
_MOST = 20  # number of lengths that are all named and marked
_FONT = 'font-family="system-ui, DejaVu Sans, sans-serif" font-size="11.5"'
_SOFT, _LINE = "#667079", "#e3e5e8"


def by_length(
    title: str, lengths: Sequence[int], series: Mapping[str, Sequence[float | None]], across: str, up: str
) -> str:
    """Return an SVG element that is readable alone. series: name -> score (0 to 1) at each length, drawn in percent.

    Lengths stand side by side at equal distances, as they usually double. across, up: names of the axes, with units.
    """
    at = [_x(n, len(lengths)) for n in range(len(lengths))]
    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>', *map(_level, (0, 0.25, 0.5, 0.75, 1))]
    step = -(-len(lengths) // _MOST)
    parts += [_text(x, HEIGHT - BOTTOM + 18, f"{length:,}") for x, length in [*zip(at, lengths, strict=True)][::step]]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, across))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<g transform="rotate(-90 13 {middle})">{_text(13, middle, up)}</g>')
    for n, (name, scores) in enumerate(series.items()):
        parts.append(_line(n, name, list(zip(at, scores, strict=True)), lengths, step))
        parts.append(_key(n, name))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" {_FONT}>'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _x(n: int, count: int) -> float:
    room = WIDTH - LEFT - RIGHT - 40
    return LEFT + 20 + (room / 2 if count == 1 else room * n / (count - 1))


def _y(score: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - score)


def _level(score: float) -> str:
    y = _y(score)
    return (
        f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" style="stroke:{_SOFT if score == 0 else _LINE};fill:none"/>'
        f"{_text(LEFT - 7, y + 4, f'{100 * score:.0f}', 'end')}"
    )


def _line(n: int, name: str, points: Sequence[tuple[float, float | None]], lengths: Sequence[int], step: int) -> str:
    """Return a line with a mark at every `step`th point."""
    there = [(x, score, length) for (x, score), length in zip(points, lengths, strict=True) if score is not None]
    path = "L".join(f"{x:.1f} {_y(score):.1f}" for x, score, _ in there)
    marks = "".join(
        f"<g><title>{escape(name)}, {length:,}: {100 * score:.1f}%</title>{mark(n, x, _y(score))}</g>"
        for x, score, length in there[::step]
    )
    return f'<path d="M{path}" style="{stroke(n)}"/>{marks}' if there else ""


def _key(n: int, name: str) -> str:
    x, y = WIDTH - RIGHT + 14, TOP + 12 + 20 * n
    line = f'<path d="M{x} {y}h40" style="{stroke(n)}"/>{mark(n, x + 20, y)}'
    return line + _text(x + 47, y + 4, shortened(name), "start")


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="fill:{_SOFT}">{escape(text)}</text>'

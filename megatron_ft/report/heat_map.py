"""A heat map as SVG: a cell for each column and row, darker for a higher score, with its number, so that it can be read in grey."""

from collections.abc import Mapping, Sequence
from html import escape

LEFT, TOP, BOTTOM, KEY = 62, 10, 44, 72  # SVG units around the cells; KEY: the scale at the right
WIDEST, CELL_HEIGHT = 92, 34
_LIGHT, _DARK = (236, 242, 252), (13, 50, 120)
_EMPTY = "#ffffff"
_INK, _SOFT = "#1d2126", "#667079"
_WHITE_FROM = 0.6  # score above which white numbers have more contrast than dark ones
_FONT = 'font-family="system-ui, DejaVu Sans, sans-serif" font-size="11.5"'


def heat_map(
    title: str,
    columns: Sequence[str],
    rows: Sequence[str],
    cells: Mapping[tuple[int, int], float],
    across: str,
    down: str,
) -> str:
    """Return an SVG element that is readable alone. cells: (column, row) -> 0 to 1. across, down: names of the axes, with units."""
    cell = min(WIDEST, max(44, 340 / max(1, len(columns))))
    right, bottom = LEFT + cell * len(columns), TOP + CELL_HEIGHT * len(rows)
    width, height = right + KEY, bottom + BOTTOM
    parts = [f'<rect width="{width:.0f}" height="{height}" fill="{_EMPTY}"/>']
    for x, column in enumerate(columns):
        parts.append(_text(LEFT + cell * (x + 0.5), bottom + 17, column))
        for y, row in enumerate(rows):
            label = f"{across} {column}, {down} {row}"
            parts.append(_cell(LEFT + cell * x, TOP + CELL_HEIGHT * y, cell, cells.get((x, y)), label))
    for y, row in enumerate(rows):
        parts.append(_text(LEFT - 8, TOP + CELL_HEIGHT * (y + 0.5) + 4, row, "end"))
    middle = (TOP + bottom) / 2
    parts.append(_text((LEFT + right) / 2, bottom + 36, across))
    parts.append(f'<g transform="rotate(-90 12 {middle:.1f})">{_text(12, middle, down)}</g>')
    parts.append(_scale(right + 16, TOP, bottom - TOP))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" role="img" aria-label="{escape(title)}" {_FONT}>'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _cell(x: float, y: float, width: float, score: float | None, label: str) -> str:
    if score is None:
        return _box(x, y, width, _EMPTY) + _text(x + width / 2, y + CELL_HEIGHT / 2 + 4, "–")
    number = _text(
        x + width / 2, y + CELL_HEIGHT / 2 + 4, percent(score), fill="#ffffff" if score > _WHITE_FROM else _INK
    )
    return f"<g><title>{escape(label)}: {percent(score)}%</title>{_box(x, y, width, _colour(score))}{number}</g>"


def _box(x: float, y: float, width: float, fill: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{CELL_HEIGHT}" fill="{fill}" stroke="#ffffff"/>'


def _scale(x: float, top: float, height: float) -> str:
    """Return the key: a column of colours with their scores in percent."""
    steps = 10
    each = height / steps
    boxes = "".join(
        f'<rect x="{x:.1f}" y="{top + each * n:.1f}" width="12" height="{each + 0.3:.1f}" fill="{_colour(1 - n / (steps - 1))}"/>'
        for n in range(steps)
    )
    ends = _text(x + 16, top + 9, "100%", "start") + _text(x + 16, top + height, "0%", "start")
    return boxes + ends


def _colour(score: float) -> str:
    red, green, blue = (round(light + (dark - light) * score) for light, dark in zip(_LIGHT, _DARK, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}"


def _text(x: float, y: float, text: str, anchor: str = "middle", fill: str = _SOFT) -> str:
    # style, not an attribute: the page's own rule for text in figures would win over that.
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="fill:{fill}">{escape(text)}</text>'


def percent(score: float) -> str:
    return f"{100 * score:.0f}"

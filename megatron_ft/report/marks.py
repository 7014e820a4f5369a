"""Lines of several models in one chart: each with its own colour, dashes and mark, so that they can be told apart in grey."""

from __future__ import annotations

COLOURS = ("#2563c9", "#d9730d", "#17803d", "#8e44ad", "#c8281e", "#0e7c86", "#7a5c00", "#555f69")
DASHES = ("none", "7 3", "2 3", "9 3 2 3", "4 2", "12 4", "1 2", "6 2 1 2 1 2")
LONGEST = 24
"""Letters of a name in the legend."""
_CIRCLE = "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0"
_SHAPES = (
    (_CIRCLE, True), ("m-4 -4h8v8h-8z", True), ("m0 -5l5 9h-10z", True), ("m0 -6l5 6l-5 6l-5 -6z", True),
    ("m-4 -4l8 8m0 -8l-8 8", False), ("m0 5l5 -9h-10z", True), ("m-5 0h10m-5 -5v10", False), ("m-4 -4h8v8h-8z", False),
)  # fmt: skip
"""Circle, square, triangle, diamond, cross, triangle upside down, plus, empty square; and whether they are filled."""


def stroke(n: int) -> str:
    """Return the style of line n."""
    return f"fill:none;stroke-width:2;stroke:{COLOURS[n % len(COLOURS)]};stroke-dasharray:{DASHES[n % len(DASHES)]}"


def mark(n: int, x: float, y: float) -> str:
    """Return the mark of a value of line n."""
    colour, (shape, filled) = COLOURS[n % len(COLOURS)], _SHAPES[n % len(_SHAPES)]
    style = f"fill:{colour if filled else 'none'};stroke:{colour};stroke-width:1.6"
    return f'<path d="M{x:.1f} {y:.1f}{shape}" style="{style}"/>'


def shortened(name: str) -> str:
    """Return a name as it fits into the legend."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"

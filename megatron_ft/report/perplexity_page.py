"""The page of `evaluate perplexity`: a line for each model over the context's length, and tables. Lines differ in dashes and marks too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_ft.files import atomic_file
from megatron_ft.report.marks import mark, shortened, stroke
from megatron_ft.report.page import Page, table

WIDTH, HEIGHT = 720, 320  # SVG units
LEFT, RIGHT, TOP, BOTTOM = 62, 216, 16, 48
_SOFT, _LINE = "#667079", "#e3e5e8"


def write_page(result: Mapping[str, Any], page: Path, figure: Path) -> None:
    """Write the page and the figure alone. result: as in perplexity.json."""
    lengths, models = result["lengths"], result["models"]
    svg = chart(lengths, {model["name"]: [one["perplexity"] for one in model["lengths"]] for model in models})
    with atomic_file(figure, "w") as file:
        file.write(svg + "\n")
    html = Page("Perplexity by length of the context", ", ".join(result["data"]))
    html.section(
        "Perplexity",
        f'<figure style="max-width:820px">{svg}</figure>',
        _table("model", lengths, named_rows(models)),
        note=" ".join(filter(None, (how(result), beyond(models)))),
    )
    for kind in ("roles", "sources"):
        if rows := named_rows(models, kind):
            html.section(f"By {kind.removesuffix('s')}", _table("model and part", lengths, rows))
    html.write(page)


def how(result: Mapping[str, Any]) -> str:
    """Say what the numbers were measured over, and how."""
    counts = {model["name"]: model["lengths"][0]["tokens"] for model in result["models"]}
    same = len(set(counts.values())) == 1
    tokens = f"{next(iter(counts.values())):,}" if same else ", ".join(f"{n:,} ({name})" for name, n in counts.items())
    return (
        f"Windows of the given length, stride {result['stride']}, {result['precision']}: the same {tokens} tokens at every length"
        + ("." if same else "; models with different tokenizers do not compare.")
    )


def named_rows(models: Sequence[Mapping[str, Any]], kind: str | None = None) -> list[tuple[str, list[str]]]:
    """Return the perplexities of each model by length, for a table; of its parts with kind "roles" or "sources"."""
    if kind is None:
        return [(model["name"], [_marked(model, one, one) for one in model["lengths"]]) for model in models]
    return [
        (f"{model['name']}, {name}", [_marked(model, one, one[kind][name]) for one in model["lengths"]])
        for model in models
        for name in model["lengths"][0][kind]
    ]


def _marked(model: Mapping[str, Any], at: Mapping[str, Any], part: Mapping[str, Any]) -> str:
    return shown(part["perplexity"]) + ("*" if at["length"] > model["positions"] else "")


def beyond(models: Sequence[Mapping[str, Any]]) -> str | None:
    """Say what a star means, or None if no window is longer than its model's positions."""
    short = [model for model in models if model["lengths"][-1]["length"] > model["positions"]]
    if not short:
        return None
    positions = ", ".join(f"{model['positions']:,} ({model['name']})" for model in short)
    return f"* windows longer than the model's positions: {positions}."


def shown(value: float | None) -> str:
    """Return a perplexity for a table."""
    return "too large" if value is None else f"{value:,.4f}" if value < 1e6 else f"{value:.3e}"


def _table(head: str, lengths: Sequence[int], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    cells = [(name, *values) for name, values in rows]
    return table((head, *(f"{length:,} tokens" for length in lengths)), cells, ("", *["num"] * len(lengths)))


def chart(lengths: Sequence[int], series: Mapping[str, Sequence[float | None]]) -> str:
    """Return an SVG element that is readable alone. Lengths stand at equal distances; perplexities on a logarithmic axis."""
    values = [value for line in series.values() for value in line if value is not None] or [1.0]
    ticks = _ticks(min(values), max(values))
    low, high = math.log(ticks[0]), math.log(ticks[-1])
    at = [_x(n, len(lengths)) for n in range(len(lengths))]

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - math.log(value)) / (high - low)

    bottom = HEIGHT - BOTTOM
    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" style="fill:#ffffff"/>']
    for tick in ticks:
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" style="stroke:{_LINE};fill:none"/>')
        parts.append(_text(LEFT - 7, y(tick) + 4, _label(tick) if tick < 1e6 else f"{tick:.0e}", "end"))
    parts.append(f'<path d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}" style="stroke:{_SOFT};fill:none"/>')
    parts += [_text(x, bottom + 18, f"{length:,}") for x, length in zip(at, lengths, strict=True)]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "largest context (tokens)"))
    middle = (TOP + bottom) / 2
    parts.append(f'<g transform="rotate(-90 13 {middle})">{_text(13, middle, "perplexity (logarithmic)")}</g>')
    for n, (name, line) in enumerate(series.items()):
        points = [(x, y(value), value) for x, value in zip(at, line, strict=True) if value is not None]
        parts.append(_line(n, name, points))
        parts.append(_key(n, name))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="perplexity by length" '
        f'font-family="system-ui, DejaVu Sans, sans-serif" font-size="11.5">{"".join(parts)}</svg>'
    )


def _label(tick: float) -> str:
    return f"{tick:,.0f}" if tick >= 1000 else f"{tick:.4g}"


def _x(n: int, count: int) -> float:
    room = WIDTH - LEFT - RIGHT - 40
    return LEFT + 20 + (room / 2 if count == 1 else room * n / (count - 1))


def _ticks(low: float, high: float) -> list[float]:
    """Return round values from at most `low` to at least `high`, about six, at least two."""
    if high / low < 4:
        step = 10.0 ** math.floor(math.log10(max((high - low) / 4, high * 0.005)))
        step = next(digit * step for digit in (1, 2, 5, 10) if (high - low) / (digit * step) <= 5)
        first = max(math.floor(low / step), 1)
        return [step * n for n in range(first, max(math.ceil(high / step), first + 1) + 1)]
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1,) if high / low > 1e3 else (1, 2, 5)
    all_ticks = [digit * 10.0**power for power in powers for digit in digits]
    first = max(n for n, tick in enumerate(all_ticks) if tick <= low)
    last = min((n for n, tick in enumerate(all_ticks) if tick >= high), default=len(all_ticks) - 1)
    return all_ticks[first : last + 1]


def _line(n: int, name: str, points: Sequence[tuple[float, float, float]]) -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in points)
    marks = "".join(f"<g><title>{escape(name)}: {shown(value)}</title>{mark(n, x, y)}</g>" for x, y, value in points)
    return f'<path d="M{path}" style="{stroke(n)}"/>{marks}' if points else ""


def _key(n: int, name: str) -> str:
    x, y = WIDTH - RIGHT + 14, TOP + 12 + 20 * n
    line = f'<path d="M{x} {y}h40" style="{stroke(n)}"/>{mark(n, x + 20, y)}'
    return line + _text(x + 47, y + 4, shortened(name), "start")


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="fill:{_SOFT}">{escape(text)}</text>'

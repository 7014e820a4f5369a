"""The page of a split's statistics: tables, roles as bars, lengths as histograms with axes. One file without external resources."""

import html
import re
from typing import Any

import numpy as np

from megatron_ft.data.roles import ALL_NAMES, display_name
from megatron_ft.wording import counted
from tools.pretokenizer.stats import BOUNDS, HEADINGS, Tally, total
from tools.pretokenizer.writing import Written

STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}svg{display:block;margin:.3rem 0 1.2rem}h1{font-size:1.4rem}h2{font-size:1.1rem}
.bar{display:flex;height:1.3rem;width:100%;margin:.3rem 0}.key{margin:0 0 1.2rem;font-size:.85rem}.key i{display:inline-block;
width:.8em;height:.8em;margin:0 .35em 0 0}.key span{margin-right:1.2em;white-space:nowrap}pre{overflow:auto}
svg text{font:12px system-ui,sans-serif;fill:#444}svg .grid{stroke:#e2e2e2}svg .axis{stroke:#555;fill:none}"""
COLOURS = ("#8a6d3b", "#2b6cb0", "#2f855a", "#718096", "#6b46c1", "#b83280", "#a0aec0")
WIDTH, HEIGHT = 900, 210  # SVG coordinates
LEFT, RIGHT, TOP, BOTTOM = 66, 12, 22, 46


def page(name: str, written: Written, packed: list[dict[str, Any]], mixed: str) -> str:
    """Return one HTML page. Roles and lengths are those of the shards."""
    tallies = written.mixed or written.tallies
    whole = total(written.tallies)
    parts = [
        f"<h1>{html.escape(name)}</h1>",
        *(["<h2>Before mixing</h2>"] if mixed else []),
        _overview(written.tallies),
        *([f"<h2>Mix</h2><pre>{html.escape(mixed)}</pre><h2>In the shards</h2>", _overview(tallies)] if mixed else []),
        "<h2>Roles</h2><p>Tokens of each role, and their share. By default, training uses only the assistant's tokens.</p>",
        *(_roles(tally) for tally in tallies if tally.tokens),
        "<h2>Lengths of samples</h2>",
        *(f"<div>{_title(tally)}</div>{_histogram(tally.histogram)}" for tally in tallies if tally.accepted),
        "<h2>Packing</h2>",
        _table(
            ("tokens of a row", "filled when packed", "filled with one per row", "rows", "samples cut"),
            map(_packing, packed),
        ),
    ]
    skipped = [[reason, f"{count:,}"] for reason, count in sorted(whole.skipped.items())]
    if skipped:
        parts += ["<h2>Skipped</h2>", _table(("reason", "samples"), skipped)]
    title = f"<title>{html.escape(name)}</title>"
    return f"<!doctype html><meta charset=utf-8>{title}<style>{STYLE}</style>\n" + "\n".join(parts) + "\n"


def _packing(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['seq_length']:,}", f"{row['filled']:.1%}", f"{row['filled_unpacked']:.1%}", f"{row['rows']:,}", f"{row['cut']:.1%}",
    ]  # fmt: skip


def _overview(tallies: list[Tally]) -> str:
    rows = [*(tally.row() for tally in tallies), ["total", *total(tallies).row()[1:]]]
    return _table(HEADINGS, [[name, *map(_grouped, cells)] for name, *cells in rows])


def _grouped(cell: str) -> str:
    """Return a cell with commas in its large numbers."""
    return re.sub(r"\d{4,}", lambda digits: f"{int(digits[0]):,}", cell)


def _title(tally: Tally) -> str:
    return html.escape(f"{tally.name}: {counted(tally.accepted, 'sample')}, {counted(tally.tokens, 'token')}")


def _table(head: Any, rows: Any) -> str:
    def cells(row: Any, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    return f"<table>{cells(head, 'th')}{''.join(cells(row, 'td') for row in rows)}</table>"


def _roles(tally: Tally) -> str:
    """Return a bar of all tokens, and below it the count and share of each role."""
    found = [
        (display_name(name), count, colour)
        for name, count, colour in zip(ALL_NAMES, tally.tokens_by_role.tolist(), COLOURS, strict=True)
        if count
    ]
    spans = "".join(
        f'<span style="width:{100 * count / tally.tokens:.2f}%;background:{colour}" title="{name}: {count:,}"></span>'
        for name, count, colour in found
    )
    key = "".join(
        f'<span><i style="background:{colour}"></i>{name} {count:,} ({count / tally.tokens:.1%})</span>'
        for name, count, colour in found
    )
    if tally.marked_tokens:
        key += f"<span>marked {tally.marked_tokens:,} ({tally.marked_tokens / tally.tokens:.1%})</span>"
    return f'<div>{_title(tally)}</div><div class="bar">{spans}</div><div class="key">{key}</div>'


def _histogram(counts: np.ndarray) -> str:
    """Return bars over a logarithmic axis of lengths, each with its count above it where there is room."""
    used = np.flatnonzero(counts)
    first, last = int(used[0]), int(used[-1])
    bars = range(first, last + 1)
    step, base = min((WIDTH - LEFT - RIGHT) / len(bars), 90.0), HEIGHT - BOTTOM
    ticks = _ticks(int(counts.max()))
    unit = (base - TOP) / max(ticks[-1], int(counts.max()))
    parts = [_level(tick, base - tick * unit) for tick in ticks]
    for number, i in enumerate(bars):
        parts.append(_bar(int(counts[i]), _range(i), LEFT + number * step, step, base, unit, counts=len(bars) <= 24))
    every = -(-len(bars) // 12)
    edges = [i for i in range(first, last + 2) if (i - first) % every == 0 and i < len(BOUNDS)]
    parts += [_text(LEFT + (i - first) * step, base + 16, f"{BOUNDS[i]:,}") for i in edges]
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{base}H{LEFT + len(bars) * step:.1f}"/>')
    parts.append(_text(max(LEFT + len(bars) * step / 2, LEFT + 80), HEIGHT - 8, "tokens per sample, logarithmic"))
    parts.append(_text(LEFT - 8, TOP - 8, "samples", "end"))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="samples by length">{"".join(parts)}</svg>'


def _range(i: int) -> str:
    """Return the lengths of a bar in words."""
    if i + 1 == len(BOUNDS):
        return f"{BOUNDS[i]:,} tokens and more"
    last = int(BOUNDS[i + 1]) - 1
    return f"{BOUNDS[i]:,} to {last:,} tokens" if last > BOUNDS[i] else counted(last, "token")


def _bar(count: int, lengths: str, x: float, step: float, base: float, unit: float, counts: bool) -> str:
    tall = count * unit
    number = _text(x + step / 2, base - tall - 4, f"{count:,}") if count and counts else ""
    return (
        f'<rect x="{x + step * 0.05:.1f}" y="{base - tall:.1f}" width="{step * 0.9:.1f}" height="{tall:.1f}" fill="#2b6cb0">'
        f"<title>{lengths}: {counted(count, 'sample')}</title></rect>{number}"
    )


def _level(value: int, y: float) -> str:
    return f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>' + _text(LEFT - 8, y + 4, f"{value:,}", "end")


def _ticks(most: int) -> list[int]:
    """Return 0 and up to four round numbers of samples, none above `most`."""
    power = 10 ** (len(str(most)) - 1)
    steps = (digit * scale for scale in (max(1, power // 10), power) for digit in (1, 2, 5))
    step = next(step for step in steps if most // step <= 4)
    return list(range(0, most + 1, step))


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'

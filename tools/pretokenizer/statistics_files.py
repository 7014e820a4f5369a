"""Writes PREFIX_stats.{txt,json,html}: the same statistics for a terminal, for programs, and for a browser."""

import html
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ft.data.roles import ALL_NAMES, display_name
from megatron_ft.files import atomic_file, write_json
from tools.pretokenizer import mixing
from tools.pretokenizer.original_stats import original_form
from tools.pretokenizer.pool import Pool
from tools.pretokenizer.sources import Source
from tools.pretokenizer.stats import BOUNDS, HEADINGS, Tally, report, total
from tools.pretokenizer.writing import Written

SEQ_LENGTHS = (2048, 4096, 8192, 16384)
ENOUGH = 10_000  # number of samples from which the packing is estimated


def write_stats(prefix: Path, written: Written, sources: list[Source], mix_by: str | None, pool: Pool) -> None:
    """Write three files beside the shards of a split. With a mix, they describe the datasets before and after mixing."""
    rows = [tally.as_json() for tally in written.tallies]
    for row, source in zip(rows, sources, strict=True):
        row["left_out_by_reader"] = dict(sorted(source.left_out.items()))
        if source.unread:
            row["keys_not_read"] = dict(sorted(source.unread.items()))
    packed = packing_table(written.lengths, pool)
    content: dict[str, Any] = {"datasets": rows, "total": total(written.tallies).as_json(), "packing": packed}
    text, mixed = report(written.tallies), ""
    if written.mix and mix_by:
        mixed = mixing.report(written.mix, mix_by)
        text = f"before mixing:\n\n{text}\nmix by {mix_by}:\n\n{mixed}\nin the shards:\n\n{report(written.mixed)}"
        content["mix"] = [
            {
                "name": p.name,
                "requested": p.requested,
                "realised": p.realised,
                "epochs": p.epochs,
                "samples": len(p.picks),
            }
            for p in written.mix
        ]
        content["mixed"] = [tally.as_json() for tally in written.mixed]
        content["mixed_total"] = total(written.mixed).as_json()
    write_json(Path(f"{prefix}_stats.json"), content)
    with atomic_file(Path(f"{prefix}_stats.txt"), "w") as file:
        file.write(text + "\npacking of whole samples, share of positions filled, by row length:\n" + _lines(packed))
        file.write(original_form(prefix.name, sources, written.tallies, sampled=str(prefix).endswith("-train")))
    with atomic_file(Path(f"{prefix}_stats.html"), "w") as file:
        file.write(page(prefix.name, written, packed, mixed))


def packing_table(lengths: np.ndarray, pool: Pool) -> list[dict[str, Any]]:
    """Return how samples of these lengths fill rows of each of SEQ_LENGTHS: packed, and padded with one sample per row. Estimated from
    ENOUGH samples if there are more."""
    some = np.asarray(lengths)
    if len(some) > ENOUGH:
        some = some[np.random.default_rng(0).permutation(len(some))[:ENOUGH]]
    times = len(lengths) / max(1, len(some))
    return [
        {**row, "rows": round(row["rows"] * times)}
        for row in pool.map("packing", ((some, seq_length) for seq_length in SEQ_LENGTHS))
    ]


def _lines(packed: list[dict[str, Any]]) -> str:
    return "".join(
        f"  {row['seq_length']}: {row['filled']:.1%} packed, {row['filled_unpacked']:.1%} padded, "
        f"{row['rows']} rows, {row['cut']:.1%} of samples cut\n"
        for row in packed
    )


STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}svg{display:block;margin:.3rem 0 1.2rem}h1{font-size:1.4rem}h2{font-size:1.1rem}
.bar{display:flex;height:1.3rem;width:100%;margin:.3rem 0 1.2rem}.bar span{overflow:hidden;color:#fff;font-size:.75rem;
padding:.1rem .3rem}pre{overflow:auto}"""
COLOURS = ("#8a6d3b", "#2b6cb0", "#2f855a", "#718096", "#6b46c1", "#b83280", "#a0aec0")


def page(name: str, written: Written, packed: list[dict[str, Any]], mixed: str) -> str:
    """Return one HTML page without external resources. Roles and lengths are those of the shards."""
    tallies = written.mixed or written.tallies
    whole = total(written.tallies)
    parts = [
        f"<h1>{html.escape(name)}</h1>",
        *(["<h2>Before mixing</h2>"] if mixed else []),
        _overview(written.tallies),
        *([f"<h2>Mix</h2><pre>{html.escape(mixed)}</pre><h2>In the shards</h2>", _overview(tallies)] if mixed else []),
        "<h2>Roles</h2><p>Share of the tokens. By default, training uses only the assistant's tokens.</p>",
        *(_roles(tally) for tally in tallies if tally.tokens),
        "<h2>Lengths of samples, in tokens</h2>",
        *(f"<div>{html.escape(tally.name)}</div>{_histogram(tally.histogram)}" for tally in tallies if tally.accepted),
        "<h2>Packing</h2>",
        _table(
            ("row", "filled when packed", "filled with one per row", "rows", "samples cut"),
            [
                [
                    f"{r['seq_length']}",
                    f"{r['filled']:.1%}",
                    f"{r['filled_unpacked']:.1%}",
                    f"{r['rows']}",
                    f"{r['cut']:.1%}",
                ]
                for r in packed
            ],
        ),
    ]
    skipped = [[reason, str(count)] for reason, count in sorted(whole.skipped.items())]
    if skipped:
        parts += ["<h2>Skipped</h2>", _table(("reason", "samples"), skipped)]
    title = f"<title>{html.escape(name)}</title>"
    return f"<!doctype html><meta charset=utf-8>{title}<style>{STYLE}</style>\n" + "\n".join(parts) + "\n"


def _overview(tallies: list[Tally]) -> str:
    return _table(HEADINGS, [tally.row() for tally in tallies] + [["total", *total(tallies).row()[1:]]])


def _table(head: Any, rows: Any) -> str:
    def cells(row: Any, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    return f"<table>{cells(head, 'th')}{''.join(cells(row, 'td') for row in rows)}</table>"


def _roles(tally: Tally) -> str:
    spans = ""
    for name, count, colour in zip(ALL_NAMES, tally.tokens_by_role.tolist(), COLOURS, strict=True):
        if count:
            share = 100 * count / tally.tokens
            spans += f'<span style="width:{share:.2f}%;background:{colour}">{display_name(name)} {share:.1f}%</span>'
    marked = f", {100 * tally.marked_tokens / tally.tokens:.1f}% marked" if tally.marked_tokens else ""
    return f'<div>{html.escape(tally.name)}{marked}</div><div class="bar">{spans}</div>'


def _histogram(counts: np.ndarray) -> str:
    """Return bars over a logarithmic axis of lengths."""
    used = np.flatnonzero(counts)
    first, last = int(used[0]), int(used[-1])
    width, height = 900, 90
    step, top = width / (last - first + 1), counts.max()
    bars = ""
    for i in range(first, last + 1):
        x, tall = (i - first) * step, height * counts[i] / top
        label = f"{BOUNDS[i]} to {BOUNDS[i + 1] - 1 if i + 1 < len(BOUNDS) else '...'} tokens: {counts[i]} samples"
        bars += (
            f'<rect x="{x:.1f}" y="{height - tall:.1f}" width="{step * 0.9:.1f}" height="{tall:.1f}" fill="#2b6cb0">'
            f"<title>{label}</title></rect>"
        )
        if (i - first) % max(1, (last - first) // 10) == 0:
            bars += f'<text x="{x:.1f}" y="{height + 14}" font-size="11">{BOUNDS[i]}</text>'
    return f'<svg viewBox="0 0 {width} {height + 18}" width="{width}" role="img">{bars}</svg>'

"""Writes PREFIX_stats.{txt,json,html}: the same statistics for a terminal, for programs, and for a browser."""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_ft.files import atomic_file, write_json
from megatron_ft.wording import counted
from tools.pretokenizer import mixing
from tools.pretokenizer.original_stats import original_form
from tools.pretokenizer.pool import Pool
from tools.pretokenizer.sources import Source
from tools.pretokenizer.statistics_page import page
from tools.pretokenizer.stats import report, total
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
        f"{counted(row['rows'], 'row')}, {row['cut']:.1%} of samples cut\n"
        for row in packed
    )

"""The verdict over all results, and the file for a bug report."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from megatron_ft.doctor.result import Result
from megatron_ft.files import atomic_file


def verdict(results: Sequence[Result], seconds: float) -> str:
    """Return the verdict in one line."""
    names = {
        outcome: [one.name for one in results if one.outcome == outcome] for outcome in ("pass", "skipped", "fail")
    }
    counts = f"{len(names['pass'])} passed, {len(names['skipped'])} skipped, {len(names['fail'])} failed"
    took = f"{counts} in {int(seconds) // 60}:{int(seconds) % 60:02d}"
    if names["fail"]:
        return f"{took}. FAILED: {', '.join(names['fail'])}. Each line says how to fix the problem; the file below contains the output."
    if names["skipped"]:
        return f"{took}. All checks that ran passed; the skipped ones were not tested."
    return f"{took}. All checks passed on this machine."


def write_report(path: Path, listing: Sequence[str], results: Sequence[Result], conclusion: str) -> None:
    """Write the listing of `doctor`, the lines, the verdict, and the output of failed checks."""
    width = max(len(result.name) for result in results)
    lines = [f"megatron-ft doctor --check, {datetime.datetime.now():%Y-%m-%d %H:%M}", *listing, ""]
    lines += [result.line(width) for result in results] + ["", conclusion]
    for result in results:
        if result.log:
            lines += ["", f"--- {result.name}: the end of its output ---", result.log.rstrip()]
    with atomic_file(path, "w") as file:
        file.write("\n".join(lines) + "\n")

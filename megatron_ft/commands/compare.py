"""megatron-ft compare: losses and gradient norms of several runs in one page."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_ft.config.cli import Command, run_script
from megatron_ft.errors import ConfigError


@dataclass
class Compare:
    """Runs"""

    runs: list[str] = field(default_factory=list)
    """folders of runs: finetune's --run_dir, or its --save if that was not set"""
    names: list[str] = field(default_factory=list)
    """names of the runs in figures and tables; default: those of their folders"""
    by: Literal["step", "tokens"] = "step"
    """horizontal axis: optimizer steps, or tokens read, for runs with batches of different sizes"""
    first_steps: int = 100
    """number of first steps whose gradient norms are shown"""
    smoothing: int = 1
    """number of steps whose mean is drawn as training loss; 1: each step"""
    output: str = field(default="compare.html", metadata={"writes": "file"})
    """file for the page"""


COMMAND = Command(
    name="compare",
    summary="compare the losses and gradient norms of several runs in one HTML page",
    sections=(Compare,),
    examples=(
        "megatron-ft compare runs/pi runs/ntk runs/yarn",
        "megatron-ft compare runs/small runs/large --by tokens --smoothing 20 --output sizes.html",
    ),
    positional=("runs",),
)


def run(options: Compare) -> int:
    """Write the page and print its table. Raise DataError if a folder holds no run."""
    from megatron_ft.report.compare_page import head, result_rows, write_comparison
    from megatron_ft.report.runs import read_runs

    if len(options.runs) < 2:
        raise ConfigError("compare needs two or more folders of runs: megatron-ft compare runs/a runs/b")
    if options.first_steps < 1 or options.smoothing < 1:
        raise ConfigError("--first_steps and --smoothing must be at least 1")
    runs = read_runs([Path(run) for run in options.runs], options.names)
    for line in _columns([head(runs, options.by), *result_rows(runs, options.by)]):
        print(line)
    target = Path(options.output)
    write_comparison(runs, target, options.by, options.first_steps, options.smoothing)
    print(f"page in {target}")
    return 0


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))

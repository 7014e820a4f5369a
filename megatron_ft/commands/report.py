"""megatron-ft report: write the HTML page of a training run, also while it is running."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ft.config.cli import Command, run_script


@dataclass
class Report:
    """Run"""

    run_dir: str = field(default="", metadata={"required": True})
    """folder of the run: finetune's --run_dir, or its --save if that was not set"""
    output: str | None = field(default=None, metadata={"writes": "file"})
    """file for the page; default: report.html in the folder of the run"""


COMMAND = Command(
    name="report",
    summary="write the HTML page of a training run: curves, loss by group, layout, how to repeat it",
    sections=(Report,),
    examples=("megatron-ft report runs/tuned", "megatron-ft report runs/tuned --output tuned.html"),
    positional=("run_dir",),
)


def run(options: Report) -> int:
    """Write the page and print its path. Raise DataError if the folder holds no run."""
    from megatron_ft.report.run_page import write_run_report

    print(write_run_report(Path(options.run_dir), Path(options.output) if options.output else None))
    return 0


def write_at_end(folder: Path) -> None:
    """Write the page of a run that has just ended. An error becomes a warning and does not fail the run."""
    from megatron_ft.log import FROM_ANY_RANK, logger
    from megatron_ft.report.run_page import write_run_report

    try:
        print(f" report in {write_run_report(folder)}", flush=True)  # on the rank that prints the progress
    except Exception as error:  # the training is done and saved
        why = f"no report was written ({type(error).__name__}: {error}); run megatron-ft report {folder}"
        logger("finetune").warning(why, extra=FROM_ANY_RANK)


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))

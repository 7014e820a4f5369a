"""megatron-ft report: the page of a training run, of one that is going on too."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ft.config.cli import Command, run_script


@dataclass
class Report:
    """Which run"""

    run_dir: str = field(default="", metadata={"required": True})
    """folder of the run: --run_dir of finetune, else its --save"""
    output: str | None = None
    """where the page goes; default: report.html in that folder"""


COMMAND = Command(
    name="report",
    summary="the page of a training run: curves, where the loss is, layout, how to do it again",
    sections=(Report,),
    examples=("megatron-ft report runs/tuned", "megatron-ft report runs/tuned --output tuned.html"),
    positional=("run_dir",),
)


def run(options: Report) -> int:
    """Raises DataError where there is no run."""
    from megatron_ft.report.run_page import write_run_report

    print(write_run_report(Path(options.run_dir), Path(options.output) if options.output else None))
    return 0


def write_at_end(folder: Path) -> None:
    """The page of a run that has just ended. Never the run's failure: what goes wrong is a warning."""
    from megatron_ft.log import FROM_ANY_RANK, logger
    from megatron_ft.report.run_page import write_run_report

    try:
        print(f" report in {write_run_report(folder)}", flush=True)  # on the rank that prints the progress
    except Exception as error:  # the training is done and saved
        why = f"no report ({type(error).__name__}: {error}); try megatron-ft report {folder}"
        logger("finetune").warning(why, extra=FROM_ANY_RANK)


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))

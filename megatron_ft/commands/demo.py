"""megatron-ft demo: train a tiny model on this machine, split as on a cluster, and check that it has learnt to answer."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ft.config.cli import Command, run_script


@dataclass
class Demo:
    """Demo"""

    run_dir: str = field(default="runs/demo", metadata={"writes": "folder"})
    """folder for all files of the demo; an earlier demo in it is replaced"""
    seed: int = 1
    """seed of the generated chats, the initial weights and the order of training"""


COMMAND = Command(
    name="demo",
    summary="chats, conversion, training on 4 processes, questions before and after, export: in minutes, without a GPU",
    sections=(Demo,),
    examples=("megatron-ft demo", "megatron-ft demo --run_dir runs/demo2 --seed 2"),
)


def run(options: Demo, **sizes: Any) -> int:
    """Run the demo; return 0 if every requirement is met, else 1. Raise ConfigError for a run_dir that no demo has written.

    sizes: fields of demo.recipe.Plan, for tests that want it smaller.
    """
    from megatron_ft.demo.folder import fresh_run_folder
    from megatron_ft.demo.recipe import Plan, run_demo
    from megatron_ft.steps.shell import CommandFailed

    # Exit as for Ctrl-C, so that the started processes are stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    plan = Plan(Path(options.run_dir), options.seed, **sizes)
    with fresh_run_folder(plan.folder):
        try:
            rows = run_demo(plan)
        except CommandFailed as failure:
            print(f"\nmegatron-ft demo: a command failed\n{failure}", file=sys.stderr)
            return 1
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))

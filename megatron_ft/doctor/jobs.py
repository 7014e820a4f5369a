"""Checks of the end of a `finetune` run with several processes: a normal end, and after one process is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megatron_ft.doctor.judge import LEAVES, judge_exit, judge_killed
from megatron_ft.doctor.ranks import several
from megatron_ft.doctor.result import Ended, Found, failed
from megatron_ft.doctor.stand_ins import finetune

BEGINS, RUNS = 90.0, 60.0
"""Time limits in seconds: until the first step, and from there to the end."""
ITERATION = re.compile(r"iteration +(\d+)/ *(\d+)")


class Job:
    """A running command, whose output goes to two files of the folder. A context manager that kills all its processes at the end."""

    def __init__(self, words: list[str], folder: Path):
        self.files = (folder / "job.out", folder / "job.err")
        with self.files[0].open("w") as out, self.files[1].open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *words], stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in (*self.ranks(), self.process.pid):
            if _alive(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def wait(self, until: Callable[[str], bool], seconds: float) -> bool:
        """Wait until the output satisfies `until`. Return False if the command ended without that, or at the time limit."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if until(self.files[0].read_text(errors="replace")):
                return True
            if self.process.poll() is not None:
                return until(self.files[0].read_text(errors="replace"))
            time.sleep(0.05)
        return False

    def ranks(self) -> list[int]:
        """Return the ids of the processes that it has started, in order."""
        try:
            return [
                int(pid)
                for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            ]
        except OSError:
            return []

    def end(self, ranks: list[int], seconds: float) -> Ended:
        """Wait until it and the ranks have ended. Return code None if one has not ended within the time limit."""
        deadline = time.monotonic() + seconds
        while (self.process.poll() is None or any(map(_alive, ranks))) and time.monotonic() < deadline:
            time.sleep(0.05)
        code = None if any(map(_alive, ranks)) else self.process.poll()
        ended = Ended(code, *(file.read_text(errors="replace") for file in self.files))
        if code != 0:
            print(ended.out, ended.err, sep="\n", file=sys.stderr, flush=True)
        return ended


def _alive(pid: int) -> bool:
    """Return True if a process is running; a zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def clean_exit(folder: Path) -> Found:
    """Run some steps on several processes; check that all end soon after the last step, with exit code 0."""
    count = several()
    with Job(finetune(folder, "--bf16", "--nproc_per_node", count, iters=5), folder) as job:
        if not job.wait(_has_begun, BEGINS):
            return failed(f"no step was taken: {job.end([], 0).reason}")
        ranks = job.ranks()
        if not job.wait(_is_done, RUNS):
            return failed(f"the last step was not reached: {job.end(ranks, 0).reason}")
        began = time.monotonic()
        ended = job.end(ranks, LEAVES)
        return judge_exit(ended, count, time.monotonic() - began)


def killed_rank(folder: Path) -> Found:
    """Kill the last rank during a step with SIGKILL; check that the launcher reports it first and ends the others."""
    count = several()
    with Job(finetune(folder, "--bf16", "--nproc_per_node", count, iters=1_000_000), folder) as job:
        if not job.wait(_has_begun, BEGINS):
            return failed(f"no step was taken: {job.end([], 0).reason}")
        ranks = job.ranks()
        if len(ranks) != count:
            return failed(f"{len(ranks)} of {count} processes were started")
        began = time.monotonic()
        os.kill(ranks[-1], signal.SIGKILL)
        ended = job.end(ranks, LEAVES)
        return judge_killed(ended, ranks[-1], time.monotonic() - began)


def _has_begun(out: str) -> bool:
    return ITERATION.search(out) is not None


def _is_done(out: str) -> bool:
    return any(number == last for number, last in ITERATION.findall(out))

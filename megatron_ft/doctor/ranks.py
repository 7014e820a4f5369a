"""Starts the processes of a check with this project's launcher: forked on a CPU, separate processes on GPUs.

`python -m megatron_ft.doctor.ranks --job layouts:on_ranks --folder F --nproc_per_node 2` runs that function on each of two ranks.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from megatron_ft import device, gpu_facts
from megatron_ft.config.cli import Command, run_script
from megatron_ft.config.rank_errors import MEETING
from megatron_ft.config.sections import Processes
from megatron_ft.doctor.result import Ended
from megatron_ft.engine.parallel import joined
from megatron_ft.engine.start import prepare_engine
from megatron_ft.launch.meeting import meeting_place
from megatron_ft.launch.places import is_rank, places
from megatron_ft.launch.run import launch, planned


@dataclass
class Job:
    """Job of the processes"""

    job: str = field(default="", metadata={"required": True})
    """module:function in megatron_ft.doctor, called with the folder"""
    folder: str = field(default="", metadata={"required": True})
    """folder for its files"""


COMMAND = Command(name="doctor", summary="a check of several processes", sections=(Job, Processes))


def run(job: Job, processes: Processes) -> int:
    here = planned(processes)
    if here and (code := launch(here, None, prepare_engine)) is not None:
        return code
    prepare_engine()
    module, function = job.job.split(":")
    with joined() if is_rank() else contextlib.nullcontext():
        getattr(import_module(f"megatron_ft.doctor.{module}"), function)(Path(job.folder))
    return 0


def several() -> int:
    """Return the number of processes for a check of several: two, or one on a machine with a single GPU."""
    return min(2, len(gpu_facts.gpus())) if device.has_gpu() else 2


def run_on_ranks(job: str, folder: Path, processes: int, seconds: float) -> Ended:
    """Run module:function on several ranks. On failure, print their output to standard error too."""
    words = ["megatron_ft.doctor.ranks", "--job", job, "--folder", str(folder), "--nproc_per_node", str(processes)]
    return run_module(words, seconds)


def run_module(words: Sequence[str], seconds: float, **environment: str) -> Ended:
    """Run `python -m WORDS`; kill it after this many seconds, and with it the ranks of a launcher."""
    process = subprocess.Popen(
        [sys.executable, "-m", *words], text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    )  # fmt: skip
    return _wait(process, seconds)


def run_as_ranks(words: Sequence[str], processes: int, seconds: float, **environment: str) -> Ended:
    """Run `python -m WORDS` as the ranks of one run, as another launcher would. Return the result of the first that failed."""
    assert not is_rank()
    with meeting_place(places(Processes(nproc_per_node=processes, nnodes=1))) as (here, held):
        assert held is not None
        started = [
            subprocess.Popen(
                [sys.executable, "-m", *words], text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, pass_fds=[] if local else [held.fileno()],
                env={**os.environ, **here.environment(local), **({} if local else {MEETING: str(held.fileno())}), **environment},
            )
            for local in range(processes)
        ]  # fmt: skip
    ended = [_wait(process, seconds) for process in started]
    return next((one for one in ended if one.code), next((one for one in ended if one.code is None), ended[0]))


def _wait(process: subprocess.Popen, seconds: float) -> Ended:
    try:
        out, err = process.communicate(timeout=seconds)
        code = process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        (out, err), code = process.communicate(), None
    if code != 0:
        print(out, err, sep="\n", file=sys.stderr, flush=True)
    return Ended(code, out, err)


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))

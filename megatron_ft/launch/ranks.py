"""Starts a process for every rank of this machine: forked from one that has imported the engine, or as a new process.

Forking is fast (one import instead of one per rank) and shares the libraries' memory. A process cannot be forked after it has used the
GPU driver, so machines with a GPU start each rank as a new process, as torchrun does.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ft import device
from megatron_ft.config.rank_errors import FOLDER, MEETING
from megatron_ft.launch.places import Places

_PR_SET_PDEATHSIG = 1


@dataclass
class Rank:
    """A started process. code: exit code as in subprocess, negative for a signal; None while it runs."""

    number: int
    pid: int
    code: int | None = None
    killed: bool = False
    """The launcher killed it because another rank had failed."""
    outputs: dict[int, int] = field(default_factory=dict)
    """1 and 2 -> our ends of the pipes of its standard output and error; empty: it shares ours."""

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def send(self, number: int) -> None:
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def start(
    places: Places,
    folder: Path,
    piped: bool,
    prepare: Callable[[], None],
    held: int | None = None,
    reads_input: bool = False,
) -> list[Rank] | None:
    """Start this machine's ranks. Return them in the launcher, None in a forked rank.

    folder: for notes between these processes and the launcher, see config/rank_errors.py. piped: read their output through pipes.
    prepare: called once before forking. held: file descriptor of the socket on which rank 0 listens. reads_input: rank 0 reads this
    process's standard input.
    """
    _share_cores(places.here)
    if device.may_use_driver():
        return [_spawn(places, local, folder, piped, held, reads_input) for local in range(places.here)]
    prepare()
    gc.freeze()  # a collection in a rank would mark, and so copy, the pages that it shares with the others
    sys.stdout.flush()
    sys.stderr.flush()
    ranks: list[Rank] = []
    for local in range(places.here):
        rank = _fork(places, local, folder, piped, held, ranks, reads_input)
        if rank is None:
            return None
        ranks.append(rank)
    return ranks


def _share_cores(processes: int) -> None:
    """Set the threads per process, unless the user did, so that all processes together have one thread per core."""
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))


def _environment(places: Places, local: int, folder: Path, held: int | None) -> dict[str, str]:
    meeting = {} if held is None or places.rank(local) else {MEETING: str(held)}
    return {**places.environment(local), FOLDER: str(folder), "PYTHONUNBUFFERED": "1", **meeting}


def _spawn(places: Places, local: int, folder: Path, piped: bool, held: int | None, reads_input: bool) -> Rank:
    """Start a rank with this process's command line, as torchrun would."""
    ends = subprocess.PIPE if piped else None
    environment = _environment(places, local, folder, held)
    with _signals_held_back():
        process = subprocess.Popen(
            sys.orig_argv, env={**os.environ, **environment}, stdin=_input(reads_input, places, local), stdout=ends, stderr=ends,
            preexec_fn=_begin_as_child, pass_fds=[held] if held is not None and MEETING in environment else [],
        )  # fmt: skip
    outputs = {}
    for number, pipe in ((1, process.stdout), (2, process.stderr)):
        if pipe:
            outputs[number] = os.dup(pipe.fileno())
            pipe.close()
    process.returncode = 0  # this module waits for it, not the Popen object
    return Rank(places.rank(local), process.pid, outputs=outputs)


def _input(reads_input: bool, places: Places, local: int) -> int | None:
    """Return what a rank has as its standard input, as Popen takes it: None is this process's own."""
    return None if reads_input and places.rank(local) == 0 else subprocess.DEVNULL


def _fork(
    places: Places, local: int, folder: Path, piped: bool, held: int | None, older: list[Rank], reads_input: bool
) -> Rank | None:
    pipes = {number: os.pipe() for number in (1, 2)} if piped else {}
    with _signals_held_back():
        pid = os.fork()
        if not pid:
            _begin_as_child()
    if pid:
        for _, theirs in pipes.values():
            os.close(theirs)
        return Rank(places.rank(local), pid, outputs={number: ours for number, (ours, _) in pipes.items()})
    for rank in older:
        for end in rank.outputs.values():
            os.close(end)
    if _input(reads_input, places, local) is not None:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for output, (ours, theirs) in pipes.items():
        os.dup2(theirs, output)
        os.close(ours)
        os.close(theirs)
    streams: tuple[Any, ...] = (sys.stdout, sys.stderr)
    for stream in streams:
        stream.reconfigure(line_buffering=True)  # the last output of a rank must not be lost
    os.environ.update(_environment(places, local, folder, held))
    if held is not None and MEETING in os.environ:
        os.environ[MEETING] = str(os.dup(held))  # the launcher's code closes its own copy, also in this process
    return None


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Block signals while a process is started.

    A new process first has the launcher's handlers. A signal at that moment would only be recorded in its copy of the launcher's state,
    and the rank would continue.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_as_child() -> None:
    """In a new process: remove the launcher's handlers, then unblock signals. Pending ones end it; there is nothing to save yet."""
    for number in _SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    _die_with_parent()


def _die_with_parent() -> None:
    """Have Linux kill this rank when its launcher ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

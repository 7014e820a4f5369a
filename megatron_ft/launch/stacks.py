"""Finds the rank that the others wait for: the one that is stopped, or that computes, sleeps or reads where they communicate.

Each rank writes its stack when asked (config/launched.py); a stopped one does so the moment it is allowed to go on, before
anything else happens in it.
"""

from __future__ import annotations

import linecache
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ft.config import launched
from megatron_ft.launch.ranks import Rank

_THREADS = re.compile(r"\n+(?=(?:Current thread|Thread) )")
_FRAME = re.compile(r'File "(.+?)", line (\d+) in')
_IN_FILE = re.compile(r"torch/distributed/|p2p_communication")
_IN_LINE = re.compile(r"\.wait\(|all_reduce|all_gather|reduce_scatter|broadcast|barrier|\b[a-z_]*(send|recv)\w*\(")
"""A rank waits for others where the innermost calls are in such a file, or the innermost is of such a line."""
_INNERMOST = 3  # frames at the top of a thread's stack that tell whether it waits
_PATIENCE = 1.5  # seconds for ranks to report their own loss, then to write their stacks


@dataclass(frozen=True)
class Sighting:
    """A rank that the others wait for."""

    rank: Rank
    stopped: bool
    stack: str
    """Of all its threads, innermost call first; says so where there is none."""


def look(ranks: Sequence[Rank], folder: Path) -> list[Sighting]:
    """The stopped ranks, else those that do not wait for others; empty where all of this machine do."""
    time.sleep(_PATIENCE / 3)  # those that waited as long as the first to report will do so now
    there = [rank for rank in ranks if rank.poll() is None and rank.number not in launched.lost(folder)]
    stopped = {rank.number for rank in there if _is_stopped(rank.pid)}
    for rank in there:
        if launched.ready(folder, rank.number):
            rank.send(launched.STACK_SIGNAL)
            rank.send(signal.SIGCONT)
    time.sleep(_PATIENCE / 3)
    seen = [Sighting(rank, rank.number in stopped, _stack(folder, rank)) for rank in there]
    return [one for one in seen if one.stopped] or [one for one in seen if not is_waiting(one.stack)]


def is_waiting(stack: str) -> bool:
    """Whether any thread of a stack that faulthandler wrote is inside communication."""
    for thread in _THREADS.split(stack):
        frames = _FRAME.findall(thread)[:_INNERMOST]
        if any(_IN_FILE.search(path) for path, _ in frames):
            return True
        # What is written in C++ has no frame of its own: the line that called it tells.
        if frames and _IN_LINE.search(linecache.getline(frames[0][0], int(frames[0][1]))):
            return True
    return False


def _stack(folder: Path, rank: Rank) -> str:
    try:
        text = launched.stack_file(folder, rank.number).read_text(errors="replace").strip()
    except OSError:
        text = ""
    return oldest_first(text) or "  (no stack: it has not begun, or does not answer)"


def oldest_first(stack: str) -> str:
    """The main thread before those that it started: Python writes the newest first, and the answer is hardly ever there."""
    return "\n\n".join(reversed(_THREADS.split(stack)))


def _is_stopped(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in ("T", "t")

"""Finds the rank that the others wait for: the one that is stopped, or that computes, sleeps or reads where they communicate.

Each rank writes its stack when asked (config/rank_errors.py); a stopped one does so the moment it is allowed to go on, before
anything else happens in it.
"""

from __future__ import annotations

import linecache
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ft.config import rank_errors
from megatron_ft.launch.ranks import Rank

_WRITING = 0.3  # seconds without another line, and a stack is whole
_NO_STACK = "  (no stack: it has not begun, or does not answer)"
_THREADS = re.compile(r"\n+(?=(?:Current thread|Thread) )")
_FRAME = re.compile(r'File "(.+?)", line (\d+) in')
_IN_FILE = re.compile(r"torch/distributed/|p2p_communication")
_IN_LINE = re.compile(
    r"\.wait\(|all_reduce|all_gather|reduce_scatter|broadcast|barrier|\bTCPStore\(|\b[a-z_]*(send|recv)\w*\("
)
"""A rank waits for others where the innermost calls are in such a file, or the innermost is of such a line."""
_INNERMOST = 3  # frames at the top of a thread's stack that tell whether it waits


@dataclass(frozen=True)
class Sighting:
    """Where a rank is."""

    rank: Rank
    stopped: bool
    stack: str
    """Of all its threads, innermost call first; says so where there is none."""

    @property
    def waits(self) -> bool:
        """Whether it waits for others."""
        return is_waiting(self.stack)


class Stacks:
    """Asks ranks where they are, and collects the answers as they come."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._asked: set[int] = set()
        self.stopped: dict[int, Rank] = {}
        """Ranks that were stopped when they were asked. They go on then, and may lose the others or end: they stay the ones to look at."""
        self._came: dict[int, tuple[str, float]] = {}  # rank -> its answer so far, since when that has not grown
        self.seen: list[Sighting] = []
        """The answers so far; of a rank that cannot be asked yet, that it has no stack."""

    def ask(self, ranks: Sequence[Rank], now: float) -> bool:
        """Ask those that were not asked yet; returns whether all of these have answered, or never can. now: s, of any clock."""
        for rank in ranks:
            if rank.number not in self._asked:
                self._asked.add(rank.number)
                if _is_stopped(rank.pid):
                    self.stopped[rank.number] = rank
                if rank_errors.ready(self._folder, rank.number):
                    rank.send(rank_errors.STACK_SIGNAL)
                    rank.send(signal.SIGCONT)
        looked_at = list({rank.number: rank for rank in [*ranks, *self.stopped.values()]}.values())
        for rank in looked_at:
            text = _stack(self._folder, rank)
            if text != self._came.get(rank.number, ("", now))[0]:
                self._came[rank.number] = text, now
        self.seen = [
            Sighting(rank, rank.number in self.stopped, self._came.get(rank.number, (_NO_STACK, now))[0])
            for rank in looked_at
        ]
        return all(self._is_whole(rank, now) for rank in looked_at)

    def _is_whole(self, rank: Rank, now: float) -> bool:
        if rank.number in self._came:
            return now - self._came[rank.number][1] >= _WRITING
        return not rank_errors.ready(self._folder, rank.number) or _is_gone(rank.pid)


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
        text = rank_errors.stack_file(folder, rank.number).read_text(errors="replace").strip()
    except OSError:
        text = ""
    return oldest_first(text)


def oldest_first(stack: str) -> str:
    """The main thread before those that it started: Python writes the newest first, and the answer is hardly ever there."""
    return "\n\n".join(reversed(_THREADS.split(stack)))


def _is_stopped(pid: int) -> bool:
    return _state(pid) in ("T", "t")


def _is_gone(pid: int) -> bool:
    state = _state(pid)
    return state in ("Z", "X") or (not state and Path("/proc/self").exists())


def _state(pid: int) -> str:
    """The letter of proc(5); empty where there is no such process, or no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""

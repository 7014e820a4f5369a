"""Finds the rank that the others wait for: one that is stopped, or that is not in the communication in which the others are.

Each rank writes its stack when it receives a signal (config/rank_errors.py). A stopped one writes it as soon as it is continued, before
it does anything else.
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

_WRITING = 0.3  # seconds without another line after which a stack is complete
_NO_STACK = "  (no stack: it has not started yet, or does not respond)"
_THREADS = re.compile(r"\n+(?=(?:Current thread|Thread) )")
_FRAME = re.compile(r'File "(.+?)", line (\d+) in')
_IN_FILE = re.compile(r"torch/distributed/|p2p_communication")
_IN_LINE = re.compile(
    r"\.wait\(|all_reduce|all_gather|reduce_scatter|broadcast|barrier|\bTCPStore\(|\b[a-z_]*(send|recv)\w*\("
)
"""A rank waits for others if one of its innermost calls is in such a file, or the innermost call is such a line."""
_INNERMOST = 3  # number of innermost frames of a thread that are examined


@dataclass(frozen=True)
class Sighting:
    """The stack of a rank at one time."""

    rank: Rank
    stopped: bool
    stack: str
    """Stacks of all its threads, innermost call first, or a line that there is none."""

    @property
    def waits(self) -> bool:
        """Return True if it waits for others."""
        return is_waiting(self.stack)


class Stacks:
    """Requests the stacks of ranks and collects them as they are written."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.asked: set[int] = set()
        """Numbers of the ranks whose stack was requested."""
        self.stopped: dict[int, Rank] = {}
        """Ranks that were stopped at the request. It continues them, and they may then lose others or end; they remain suspects."""
        self._came: dict[int, tuple[str, float]] = {}  # rank -> its stack so far, time of its last growth
        self.seen: list[Sighting] = []
        """The stacks so far; a rank that has not started has the line _NO_STACK."""

    def ask(self, ranks: Sequence[Rank], now: float) -> bool:
        """Request the stacks not requested yet. Return True if all are complete or cannot come. now: seconds of any clock."""
        for rank in ranks:
            if rank.number not in self.asked:
                self.asked.add(rank.number)
                if _is_stopped(rank.pid):
                    self.stopped[rank.number] = rank
                if rank_errors.handles_stack_signal(self._folder, rank.number):
                    rank.send(rank_errors.STACK_SIGNAL)
                    rank.send(signal.SIGCONT)
        examined = list({rank.number: rank for rank in [*ranks, *self.stopped.values()]}.values())
        for rank in examined:
            text = _stack(self._folder, rank)
            if text != self._came.get(rank.number, ("", now))[0]:
                self._came[rank.number] = text, now
        self.seen = [
            Sighting(rank, rank.number in self.stopped, self._came.get(rank.number, (_NO_STACK, now))[0])
            for rank in examined
        ]
        return all(self._is_whole(rank, now) for rank in examined)

    def _is_whole(self, rank: Rank, now: float) -> bool:
        if rank.number in self._came:
            return now - self._came[rank.number][1] >= _WRITING
        return not rank_errors.handles_stack_signal(self._folder, rank.number) or _is_gone(rank.pid)


def is_waiting(stack: str) -> bool:
    """Return True if any thread of a stack, as faulthandler writes it, is in communication."""
    for thread in _THREADS.split(stack):
        frames = _FRAME.findall(thread)[:_INNERMOST]
        if any(_IN_FILE.search(path) for path, _ in frames):
            return True
        # C++ code has no frame: the line that calls it is examined.
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
    """Return the stack with the main thread first. Python writes the newest thread first, which is rarely the cause."""
    return "\n\n".join(reversed(_THREADS.split(stack)))


def _is_stopped(pid: int) -> bool:
    return _state(pid) in ("T", "t")


def _is_gone(pid: int) -> bool:
    state = _state(pid)
    return state in ("Z", "X") or (not state and Path("/proc/self").exists())


def _state(pid: int) -> str:
    """Return the state letter of proc(5), "" if there is no such process or no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""

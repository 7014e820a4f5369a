"""Which rank of this machine is the cause, once one has failed: asked again and again until it is known, however late the news.

Others often notice a death before the launcher can: a process that is killed closes its connections first and is gone later, on a
busy machine much later. So ranks that lost another one only leave a note, and never speak. Here the surest sign counts:

  sure      a rank has said what is wrong, or is about to; a rank was ended by a signal, or ended without a word
  suspect   a rank is stopped, or is elsewhere while others wait for it
  nothing   all of this machine's ranks wait for others, or lost them: the cause is on another machine
"""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from megatron_ft.config import rank_errors
from megatron_ft.launch.ranks import Rank
from megatron_ft.launch.stacks import Sighting, Stacks

EXIT_REQUEUE = 75
"""A rank stopped on purpose, everything saved: start it again. (EX_TEMPFAIL of sysexits.h)"""
SETTLE = 0.5
"""Seconds after the first sign before anybody is suspected: who waited as long as the first to report will do so now."""
DOUBT = 2.0
"""Seconds after the first sign in which a rank that seems to be elsewhere may still come and report a loss, or die."""
LIMIT = 8.0
"""Seconds after the first sign in which a rank may say what is wrong, die, or show where it is."""


class Sureness(Enum):
    """How much a launcher knows of the cause."""

    SURE = "sure"
    SUSPECT = "suspect"
    NOTHING = "nothing"


@dataclass(frozen=True)
class Finding:
    """line: to be printed; None where a rank has said it, or there is nothing to say. stack: of the rank, printed below it."""

    sureness: Sureness
    line: str | None = None
    stack: str | None = None


class Inquest:
    """Looks at the ranks of one machine. asked: signals that the launcher itself was sent, of which ranks may end."""

    def __init__(self, ranks: Sequence[Rank], folder: Path, asked: set[int]):
        self._ranks, self._folder, self._asked = ranks, folder, asked
        self._stacks = Stacks(folder)
        self.began: float | None = None
        """When the first sign came (s, of the clock that the caller uses)."""

    def signs(self) -> bool:
        """Whether a rank has failed, or reports that another one has."""
        return any(map(failed, self._ranks)) or bool(rank_errors.lost(self._folder))

    def look(self, now: float) -> Finding | None:
        """What is known now; None: wait, and ask again."""
        if sure := self._sure():
            return sure
        waited = now - (self.began if self.began is not None else now)
        if waited >= LIMIT:
            return self._suspect(self._stacks.seen) or Finding(Sureness.NOTHING)
        if rank_errors.failing(self._folder) or waited < SETTLE:
            return None
        lost = rank_errors.lost(self._folder)
        there = [rank for rank in self._ranks if rank.poll() is None and rank.number not in lost]
        if not self._stacks.ask(there, now):
            return None
        suspect = self._suspect(self._stacks.seen)
        if suspect and waited < DOUBT and not self._stacks.stopped:  # it may be about to say that it lost another one
            return None
        return suspect or Finding(Sureness.NOTHING)

    def conclude(self) -> Finding:
        """What is known once every rank has ended."""
        self._stacks.ask([], time.monotonic())  # of those that were stopped, what has come since
        return self._sure() or self._suspect(self._stacks.seen) or self._aborted() or Finding(Sureness.NOTHING)

    def loss(self) -> str | None:
        """Return the line of the rank that first lost another one; None where no rank did. To be said where no cause is found."""
        first = min(rank_errors.lost(self._folder).items(), key=lambda item: item[1].at, default=None)
        if first is None:
            return None
        number, note = first
        return (
            f"rank {number} on {socket.gethostname()} lost another process of the run, which ended or does not answer; "
            f"no launcher has seen which ({note.reason})"
        )

    def _sure(self) -> Finding | None:
        if rank_errors.said(self._folder):
            return Finding(Sureness.SURE)
        consequences = {signal.SIGABRT, *self._asked}  # the libraries abort where a connection breaks
        for rank in self._ranks:
            code = rank.code
            if code is None or rank.killed or not failed(rank) or rank.number in rank_errors.lost(self._folder):
                continue
            if code >= 0:
                return Finding(
                    Sureness.SURE, f"{name(rank)} ended with exit code {code} and did not say why; {_THE_OTHERS}"
                )
            if -code not in consequences:
                return Finding(Sureness.SURE, f"{name(rank)} was ended by {_signal(-code)}; {_THE_OTHERS}")
        return None

    def _suspect(self, seen: Sequence[Sighting]) -> Finding | None:
        """The stopped ranks come before those that are elsewhere."""
        for one in sorted(seen, key=lambda one: not one.stopped):
            if one.stopped or not one.waits:
                what = "is stopped, it answers nobody" if one.stopped else "did not come where the others waited for it"
                return Finding(Sureness.SUSPECT, f"{name(one.rank)} {what}; {_THE_OTHERS}. It was here:", one.stack)
        return None

    def _aborted(self) -> Finding | None:
        for rank in self._ranks:
            if rank.code == -signal.SIGABRT and rank.number not in rank_errors.lost(self._folder) and not rank.killed:
                return Finding(Sureness.SUSPECT, f"{name(rank)} was ended by {_signal(signal.SIGABRT)}; {_THE_OTHERS}")
        return None


_THE_OTHERS = "the others are ended"


def failed(rank: Rank) -> bool:
    """Whether a rank has ended as none should."""
    return rank.code not in (None, 0, EXIT_REQUEUE)


def name(rank: Rank) -> str:
    """Return how a rank is called in messages."""
    return f"rank {rank.number} (process {rank.pid} on {socket.gethostname()})"


def _signal(number: int) -> str:
    full = " (often the machine's way to say that its memory is full)" if number == signal.SIGKILL else ""
    return f"{signal.Signals(number).name}{full}"

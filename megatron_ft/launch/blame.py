"""Finds the rank of this machine that caused a failure. The launcher calls it repeatedly until the cause is known.

Other ranks often notice the end of a rank before the launcher can: a killed process first closes its connections and ends later, on a
busy machine much later. So a rank that lost another one only writes a note and prints no error. The most certain sign counts:

  sure      a rank has printed an error or is about to; a rank was ended by a signal, or ended without a message
  suspect   a rank is stopped, or is not in the communication call in which others wait for it
  nothing   all ranks of this machine wait for others, or lost them: the cause is on another machine
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
"""Exit code of a rank that stopped on purpose after saving: start it again. (EX_TEMPFAIL of sysexits.h)"""
SETTLE = 0.5
"""Seconds after the first sign before a rank is suspected: other ranks whose wait ends at the same time report in it."""
DOUBT = 2.0
"""Seconds after the first sign in which a suspect may still report that it lost another rank, or end."""
LIMIT = 8.0
"""Seconds after the first sign in which a rank may print an error, end, or write its stack."""


class Sureness(Enum):
    """Certainty of a launcher about the cause."""

    SURE = "sure"
    SUSPECT = "suspect"
    NOTHING = "nothing"


@dataclass(frozen=True)
class Finding:
    """The cause on one machine. line: to print; None if a rank has printed it or nothing is known. stack: printed below it."""

    sureness: Sureness
    line: str | None = None
    stack: str | None = None


class CauseFinder:
    """Examines the ranks of one machine. received: signals that the launcher itself received, which may end ranks."""

    def __init__(self, ranks: Sequence[Rank], folder: Path, received: set[int]):
        self._ranks, self._folder, self._received = ranks, folder, received
        self._stacks = Stacks(folder)
        self.began: float | None = None
        """Time of the first sign, in seconds of the caller's clock."""

    def signs(self) -> bool:
        """Return True if a rank has failed, or reports that another one has."""
        return any(map(failed, self._ranks)) or bool(rank_errors.losses(self._folder))

    def look(self, now: float) -> Finding | None:
        """Return the cause as far as it is known at time `now`; None: call again later."""
        if sure := self._sure():
            return sure
        waited = now - (self.began if self.began is not None else now)
        if waited >= LIMIT:
            return self._suspect(self._stacks.seen) or Finding(Sureness.NOTHING)
        if rank_errors.is_failing(self._folder) or waited < SETTLE:
            return None
        lost = rank_errors.losses(self._folder)
        running = [rank for rank in self._ranks if rank.poll() is None and rank.number not in lost]
        if not self._stacks.ask(running, now):
            return None
        suspect = self._suspect(self._stacks.seen)
        if (
            suspect and waited < DOUBT and not self._stacks.stopped
        ):  # it may be about to report that it lost another one
            return None
        return suspect or Finding(Sureness.NOTHING)

    def conclude(self) -> Finding:
        """Return what is known after every rank has ended."""
        self._stacks.ask([], time.monotonic())  # stacks that stopped ranks have written since
        return self._sure() or self._suspect(self._stacks.seen) or self._crashed() or Finding(Sureness.NOTHING)

    def loss(self) -> str | None:
        """Return the line of the rank that first lost another one, None if no rank did. Printed if no cause is found."""
        first = min(rank_errors.losses(self._folder).items(), key=lambda item: item[1].at, default=None)
        if first is None:
            return None
        number, note = first
        return (
            f"rank {number} on {socket.gethostname()} lost another process of the run, which ended or does not respond; "
            f"no launcher knows which one ({note.reason})"
        )

    def _sure(self) -> Finding | None:
        if rank_errors.has_reported(self._folder):
            return Finding(Sureness.SURE)
        lost = rank_errors.losses(self._folder)
        for rank in self._ranks:
            code = rank.code
            if code is None or rank.killed or not failed(rank) or rank.number in lost:
                continue
            if rank.number in self._stacks.stopped:  # it was continued; an error after that is no cause
                continue
            if code >= 0:
                return Finding(
                    Sureness.SURE,
                    f"{name(rank)} ended with exit code {code} without an error message; {_THE_OTHERS}",
                )
            if -code not in self._consequences(rank):
                return Finding(Sureness.SURE, f"{name(rank)} was ended by {_signal(-code)}; {_THE_OTHERS}")
        return None

    def _consequences(self, rank: Rank) -> set[int]:
        """Return the signals that may have ended a rank because another one had failed.

        The libraries abort when a connection breaks. A rank that writes its stack on request reads the frames of threads that are still
        running, which can crash it.
        """
        reading = {signal.SIGSEGV, signal.SIGBUS} if rank.number in self._stacks.asked else set()
        return {signal.SIGABRT, *self._received, *reading}

    def _suspect(self, seen: Sequence[Sighting]) -> Finding | None:
        """Return the first suspect: stopped ranks come before those that others wait for."""
        for one in sorted(seen, key=lambda one: not one.stopped):
            if one.stopped or not one.waits:
                what = (
                    "is stopped and does not respond"
                    if one.stopped
                    else "did not reach the call in which the others waited for it"
                )
                return Finding(Sureness.SUSPECT, f"{name(one.rank)} {what}; {_THE_OTHERS}. Its stack:", one.stack)
        return None

    def _crashed(self) -> Finding | None:
        lost = rank_errors.losses(self._folder)
        for rank in self._ranks:
            number = -(rank.code or 0)
            if number in _CRASHES and rank.number not in lost and not rank.killed:
                return Finding(Sureness.SUSPECT, f"{name(rank)} was ended by {_signal(number)}; {_THE_OTHERS}")
        return None


_CRASHES = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)
_THE_OTHERS = "the others are ended"


def failed(rank: Rank) -> bool:
    """Return True if a rank has ended with an error."""
    return rank.code not in (None, 0, EXIT_REQUEUE)


def name(rank: Rank) -> str:
    """Return a rank's name in messages."""
    return f"rank {rank.number} (process {rank.pid} on {socket.gethostname()})"


def _signal(number: int) -> str:
    full = " (often because the machine's memory is full)" if number == signal.SIGKILL else ""
    return f"{signal.Signals(number).name}{full}"

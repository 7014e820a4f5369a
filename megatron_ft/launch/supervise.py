"""Watches the ranks of one machine until all have ended: passes on signals, ends all when one fails, says which one it was.

A rank that is killed says nothing, and one that is stopped or hangs is noticed by the others alone, when their patience
(--distributed_timeout_minutes) ends. So the launcher looks: at how each process ended, and, once others report a loss, at where
those are that did not.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_ft.config import launched
from megatron_ft.launch.output import Relay
from megatron_ft.launch.ranks import Rank
from megatron_ft.launch.stacks import Sighting, look

EXIT_REQUEUE = 75
"""A rank stopped on purpose, everything saved: start it again. (EX_TEMPFAIL of sysexits.h)"""
PATIENCE = 2.0
"""Seconds that the others have, once one has failed, to end by themselves."""
_POLL = 0.05  # seconds
_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Asked:
    """Signals that this launcher got, to be passed on. A context manager: the handlers are taken down again."""

    def __init__(self):
        self.numbers: list[int] = []
        self.ever: set[int] = set()

    def __enter__(self) -> Asked:
        self._before = {number: signal.signal(number, self._note) for number in _PASSED_ON}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        self.numbers.append(number)
        self.ever.add(number)

    def pass_on(self, ranks: Sequence[Rank]) -> None:
        while self.numbers:
            number = self.numbers.pop(0)
            for rank in ranks:
                rank.send(number)


def supervise(ranks: Sequence[Rank], folder: Path, asked: Asked, relay: Relay) -> int:
    """Wait for all ranks; returns the exit code. folder: what they share with us, see config/launched.py."""
    failed_at = None
    while None in [rank.poll() for rank in ranks]:
        asked.pass_on(ranks)
        relay.copy(_POLL)
        now = time.monotonic()
        if failed_at is None and signal.SIGINT in asked.ever:  # nobody has to be named, nor waited for
            failed_at = now
        if failed_at is None and (any(map(_failed, ranks)) or launched.lost(folder)):
            failed_at = now
            _say_who(ranks, folder, asked)
        if failed_at is not None and now - failed_at > PATIENCE:
            _end(ranks)
    relay.finish()
    if failed_at is None and any(map(_failed, ranks)):
        _say_who(ranks, folder, asked)
    codes = [1 if rank.killed else rank.code or 0 for rank in ranks]
    if signal.SIGINT in asked.ever and any(codes) and 2 not in codes:
        if launched.claim(folder):  # no rank came to say so
            print("megatron-ft: stopped by Ctrl-C", file=sys.stderr, flush=True)
        return 130
    return exit_code(codes, bool(asked.ever - {signal.SIGINT}))


def exit_code(codes: Sequence[int], asked_to_stop: bool) -> int:
    """One for all ranks. codes: of each, negative for a signal, 1 where we killed it because of another."""
    by_signal = {-signal.SIGTERM, -signal.SIGUSR1}
    if 2 in codes:
        return 2
    if -signal.SIGINT in codes or 130 in codes:
        return 130
    if asked_to_stop and by_signal & set(codes):  # before there was anything to save
        return EXIT_REQUEUE
    if set(codes) <= {0, EXIT_REQUEUE}:
        return EXIT_REQUEUE if EXIT_REQUEUE in codes else 0
    return 1


def _failed(rank: Rank) -> bool:
    return rank.code not in (None, 0, EXIT_REQUEUE)


def _say_who(ranks: Sequence[Rank], folder: Path, asked: Asked) -> None:
    """Print which rank it was, where it cannot say so itself."""
    dead = [rank for rank in ranks if (rank.code or 0) < 0 and -rank.code not in {signal.SIGABRT, *asked.ever}]
    if dead:
        number = -(dead[0].code or 0)
        why = " (often the machine's way to say that its memory is full)" if number == signal.SIGKILL else ""
        _claim(folder, f"{_name(dead[0])} was ended by {signal.Signals(number).name}{why}; the others are ended too")
    elif launched.lost(folder) or any(rank.code == -signal.SIGABRT for rank in ranks):
        silent = look(ranks, folder)
        if silent and not launched.failing(folder) and _claim(folder, _describe(silent[0])):
            for sighting in silent:
                print(sighting.stack, file=sys.stderr, flush=True)


def _describe(silent: Sighting) -> str:
    what = "is stopped, it answers nobody" if silent.stopped else "did not come where the others waited for it"
    return f"{_name(silent.rank)} {what}; the others are ended. It was here:"


def _name(rank: Rank) -> str:
    return f"rank {rank.number} (process {rank.pid} on {socket.gethostname()})"


def _claim(folder: Path, line: str) -> bool:
    """Say it, unless a rank has said what went wrong."""
    mine = launched.claim(folder)
    if mine:
        print(f"megatron-ft: error: {line}", file=sys.stderr, flush=True)
    return mine


def _end(ranks: Sequence[Rank]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.killed = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGKILL)

"""Watches the ranks of one machine until all have ended: forwards signals, ends all ranks when one fails, reports the cause.

A killed rank prints nothing. Other ranks notice one that is stopped or hangs only after --distributed_timeout_minutes. So the launcher
looks for the cause (blame.py), together with the launchers of other machines (nodes.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_ft.config import rank_errors
from megatron_ft.launch.blame import LIMIT, CauseFinder, Finding, Sureness
from megatron_ft.launch.judge import Report
from megatron_ft.launch.nodes import Alone
from megatron_ft.launch.output import Relay
from megatron_ft.launch.ranks import Rank

PATIENCE = 2.0
"""Seconds in which the other ranks may end by themselves after the cause is known."""
_OTHERS = 60.0
"""After a failure: seconds after the end of this machine's ranks in which those of other machines must end. Without one: no limit."""
_POLL = 0.05  # seconds
_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class ReceivedSignals:
    """Signals that this launcher received and forwards. A context manager that restores the handlers, except after ignore()."""

    def __init__(self) -> None:
        self.pending: list[int] = []
        self.ever: set[int] = set()

    def __enter__(self) -> ReceivedSignals:
        self._before = {number: signal.signal(number, self._note) for number in _PASSED_ON}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def leave_to_ranks(self, number: int) -> None:
        """Ignore a signal that the terminal sends to the ranks too, and that need not end them."""
        signal.signal(number, signal.SIG_IGN)

    def ignore(self) -> None:
        """Ignore signals until this process ends: srun sends SIGTERM to the remaining launchers when the first one leaves."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)
        self._before = {}

    def _note(self, number: int, frame: object) -> None:
        self.pending.append(number)
        self.ever.add(number)

    def forward(self, ranks: Sequence[Rank]) -> None:
        while self.pending:
            number = self.pending.pop(0)
            for rank in ranks:
                rank.send(number)


def supervise(ranks: Sequence[Rank], folder: Path, received: ReceivedSignals, relay: Relay, link: Alone) -> int:
    """Wait for all ranks of all machines; return the exit code. folder: for notes of the ranks, see config/rank_errors.py."""
    cause = _Cause(CauseFinder(ranks, folder, received.ever), folder, link)
    deadline = None
    while None in [rank.poll() for rank in ranks]:
        received.forward(ranks)
        relay.copy(_POLL)
        link.poll()
        now = time.monotonic()
        if signal.SIGINT in received.ever:  # there is no cause to report, and no need to wait
            deadline = deadline or now + PATIENCE
        elif cause.search(now):
            deadline = min(deadline or now + LIMIT + PATIENCE, now + (PATIENCE if cause.is_known else LIMIT + PATIENCE))
        if deadline is not None and now > deadline:
            _end(ranks)
    relay.finish()
    return _leave(ranks, folder, received, cause, link)


class _Cause:
    """This launcher's knowledge of the cause, which it prints if it is the reporter."""

    def __init__(self, finder: CauseFinder, folder: Path, link: Alone):
        self._finder, self._folder, self._link = finder, folder, link
        self._finding: Finding | None = None
        self._reported = False

    @property
    def is_known(self) -> bool:
        """Return True if it is decided which launcher reports it."""
        return self._link.news.reporter is not None

    def search(self, now: float) -> bool:
        """Return True after a failure. Then look for the cause, send it to the others, and print it if this is the reporter."""
        finder, link = self._finder, self._link
        if finder.began is None:
            if not (link.news.trouble or finder.signs()):
                return False
            finder.began = now
            link.trouble()
        if self._finding is None or (self._finding.sureness is not Sureness.SURE and not self.is_known):
            self._send(finder.look(now))
        self._report()
        return True

    def conclude(self) -> None:
        """Look for the cause a last time, after all ranks of this machine have ended."""
        if self._finder.began is None and self._finder.signs():
            self._link.trouble()
            self._finder.began = time.monotonic()
        if self._finder.began is not None and not self.is_known:
            self._send(self._finder.conclude())

    def report(self, at_the_end: bool) -> None:
        """Print the cause if this launcher is the reporter. at_the_end: also print that it is not known."""
        self._report(at_the_end)

    def _send(self, finding: Finding | None) -> None:
        if finding is None or (self._finding is not None and finding.sureness is self._finding.sureness):
            return
        if finding.sureness is Sureness.NOTHING and self._finding is not None:
            return  # a suspect remains one after it has ended
        self._finding = finding
        self._link.found(finding.sureness)

    def _report(self, at_the_end: bool = False) -> None:
        if self._reported or self._link.news.reporter != self._link.node:
            return
        finding = self._finding or Finding(Sureness.NOTHING)
        line, stack = finding.line, finding.stack
        # A lost launcher is certain; a suspected rank may only be its consequence.
        if finding.sureness is not Sureness.SURE and (gone := self._link.gone()):
            line, stack = gone, None
        elif finding.sureness is Sureness.NOTHING and at_the_end:
            line = self._finder.loss()
        if line is None:
            self._reported = finding.sureness is Sureness.SURE
            return
        self._reported = True
        if rank_errors.claim(self._folder):
            print(f"megatron-ft: error: {line}", file=sys.stderr, flush=True)
            if stack:
                print(stack, file=sys.stderr, flush=True)


def _leave(ranks: Sequence[Rank], folder: Path, received: ReceivedSignals, cause: _Cause, link: Alone) -> int:
    """Wait until the ranks of all machines have ended, so that launchers leave together. Return the exit code of all."""
    codes = tuple(1 if rank.killed else rank.code or 0 for rank in ranks)
    by_signal = received.ever & {
        -code for code in codes
    }  # ended by a signal to the launcher: there is no cause to report
    interrupted = signal.SIGINT in received.ever
    if not by_signal and not interrupted:
        cause.conclude()
    lost = not by_signal and bool(rank_errors.losses(folder))
    link.ended(Report(codes, bool(received.ever - {signal.SIGINT}), interrupted, lost))
    link.poll()
    ended = time.monotonic()
    while link.news.code is None and signal.SIGINT not in received.ever:
        if link.news.trouble and time.monotonic() - ended > _OTHERS:
            break
        time.sleep(_POLL)
        link.poll()
        cause.report(at_the_end=False)
    received.ignore()
    code = link.news.code
    if code is None:
        code = 130 if interrupted or signal.SIGINT in received.ever else 1
    if code == 130:
        if rank_errors.claim(folder):  # no rank has printed it
            print("megatron-ft: stopped by Ctrl-C", file=sys.stderr, flush=True)
    elif code == 1:
        cause.report(at_the_end=True)
    return code


def _end(ranks: Sequence[Rank]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.killed = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGKILL)

"""Watches the ranks of one machine until all have ended: passes on signals, ends all when one fails, names the cause.

A rank that is killed says nothing, and one that is stopped or hangs is noticed by the others alone, when their patience
(--distributed_timeout_minutes) ends. So the launcher looks (blame.py), with the launchers of other machines (nodes.py).
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
from megatron_ft.launch.blame import LIMIT, Finding, Inquest, Sureness
from megatron_ft.launch.judge import Report
from megatron_ft.launch.nodes import Alone
from megatron_ft.launch.output import Relay
from megatron_ft.launch.ranks import Rank

PATIENCE = 2.0
"""Seconds that the others have, once the cause is known, to end by themselves."""
_OTHERS = 60.0
"""Seconds after our ranks' end in which the other machines' have to end too, where something is wrong. Else they may take their time."""
_POLL = 0.05  # seconds
_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Asked:
    """Signals that this launcher got, to be passed on. A context manager: the handlers are taken down again, but for hear_no_more()."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.ever: set[int] = set()

    def __enter__(self) -> Asked:
        self._before = {number: signal.signal(number, self._note) for number in _PASSED_ON}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def hear_no_more(self) -> None:
        """To the end of this process: srun sends SIGTERM to those that are still there when the first leaves."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)
        self._before = {}

    def _note(self, number: int, frame: object) -> None:
        self.numbers.append(number)
        self.ever.add(number)

    def pass_on(self, ranks: Sequence[Rank]) -> None:
        while self.numbers:
            number = self.numbers.pop(0)
            for rank in ranks:
                rank.send(number)


def supervise(ranks: Sequence[Rank], folder: Path, asked: Asked, relay: Relay, link: Alone) -> int:
    """Wait for all ranks, of all machines; returns the exit code. folder: what ranks share with us, see config/rank_errors.py."""
    cause = _Cause(Inquest(ranks, folder, asked.ever), folder, link)
    deadline = None
    while None in [rank.poll() for rank in ranks]:
        asked.pass_on(ranks)
        relay.copy(_POLL)
        link.poll()
        now = time.monotonic()
        if signal.SIGINT in asked.ever:  # nobody has to be named, nor waited for
            deadline = deadline or now + PATIENCE
        elif cause.is_sought(now):
            deadline = min(deadline or now + LIMIT + PATIENCE, now + (PATIENCE if cause.is_known else LIMIT + PATIENCE))
        if deadline is not None and now > deadline:
            _end(ranks)
    relay.finish()
    return _leave(ranks, folder, asked, cause, link)


class _Cause:
    """What is known of the cause here, and whether it is ours to name."""

    def __init__(self, inquest: Inquest, folder: Path, link: Alone):
        self._inquest, self._folder, self._link = inquest, folder, link
        self._finding: Finding | None = None
        self._said = False

    @property
    def is_known(self) -> bool:
        """Whether it is decided who names it."""
        return self._link.news.speaker is not None

    def is_sought(self, now: float) -> bool:
        """Look, where there is reason to, tell the others, and say it where it is ours to say. now: s. Returns whether there is reason."""
        inquest, link = self._inquest, self._link
        if inquest.began is None:
            if not (link.news.trouble or inquest.signs()):
                return False
            inquest.began = now
            link.trouble()
        if self._finding is None or (self._finding.sureness is not Sureness.SURE and not self.is_known):
            self._tell(inquest.look(now))
        self._speak()
        return True

    def conclude(self) -> None:
        """All ranks of this machine have ended."""
        if self._inquest.began is None and self._inquest.signs():
            self._link.trouble()
            self._inquest.began = time.monotonic()
        if self._inquest.began is not None and not self.is_known:
            self._tell(self._inquest.conclude())

    def speak(self, in_the_end: bool) -> None:
        """Say it where it is ours to say. in_the_end: also that nobody knows it."""
        self._speak(in_the_end)

    def _tell(self, finding: Finding | None) -> None:
        if finding is None or (self._finding is not None and finding.sureness is self._finding.sureness):
            return
        if finding.sureness is Sureness.NOTHING and self._finding is not None:
            return  # a suspect that has ended since stays one
        self._finding = finding
        self._link.found(finding.sureness)

    def _speak(self, in_the_end: bool = False) -> None:
        if self._said or self._link.news.speaker != self._link.node:
            return
        finding = self._finding or Finding(Sureness.NOTHING)
        line, stack = finding.line, finding.stack
        # A launcher that is gone is a fact; a rank that is elsewhere may be so because of it.
        if finding.sureness is not Sureness.SURE and (gone := self._link.gone()):
            line, stack = gone, None
        elif finding.sureness is Sureness.NOTHING and in_the_end:
            line = self._inquest.loss()
        if line is None:
            self._said = finding.sureness is Sureness.SURE
            return
        self._said = True
        if rank_errors.claim(self._folder):
            print(f"megatron-ft: error: {line}", file=sys.stderr, flush=True)
            if stack:
                print(stack, file=sys.stderr, flush=True)


def _leave(ranks: Sequence[Rank], folder: Path, asked: Asked, cause: _Cause, link: Alone) -> int:
    """Wait until all machines' ranks have ended, so that launchers leave together. Returns the exit code of all."""
    codes = tuple(1 if rank.killed else rank.code or 0 for rank in ranks)
    told = asked.ever & {-code for code in codes}  # ended by what the launcher was sent: there is no cause to name
    interrupted = signal.SIGINT in asked.ever
    if not told and not interrupted:
        cause.conclude()
    lost = not told and bool(rank_errors.lost(folder))
    link.ended(Report(codes, bool(asked.ever - {signal.SIGINT}), interrupted, lost))
    link.poll()
    ended = time.monotonic()
    while link.news.code is None and signal.SIGINT not in asked.ever:
        if link.news.trouble and time.monotonic() - ended > _OTHERS:
            break
        time.sleep(_POLL)
        link.poll()
        cause.speak(in_the_end=False)
    asked.hear_no_more()
    code = link.news.code
    if code is None:
        code = 130 if interrupted or signal.SIGINT in asked.ever else 1
    if code == 130:
        if rank_errors.claim(folder):  # no rank came to say so
            print("megatron-ft: stopped by Ctrl-C", file=sys.stderr, flush=True)
    elif code == 1:
        cause.speak(in_the_end=True)
    return code


def _end(ranks: Sequence[Rank]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.killed = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGKILL)

"""Logging must not end a run, delay it, or prevent a save.

An error of a logger is printed once, as one warning, and the logger is not used again. A logger that may hang, because it communicates
with another process or a server, works in a separate thread, and every wait for it has a time limit.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_ft.errors import UserError
from megatron_ft.log import FROM_ANY_RANK, logger
from megatron_ft.training.hooks import Hook
from megatron_ft.training.samples import Sample

log = logger("training")

TO_START, TO_ANSWER, TO_FINISH = 120.0, 60.0, 20.0
"""Longest waits in seconds for a logger in a separate thread: for its start, for one call, and at the end. When SLURM ends a job, 30 s are
left after SIGTERM by default."""


def attempt(name: str, action: Callable[[], Any]) -> None:
    """Call a function that only observes. name: its name for the user. A UserError is raised: the user can fix it before training."""
    try:
        action()
    except UserError:
        raise
    except Exception as error:
        give_up(name, error)


def give_up(name: str, error: BaseException | str) -> None:
    """Return the line about a logger that failed."""
    log.warning(f"{name}: {_reason(error)}; nothing more is logged there, the run continues", extra=FROM_ANY_RANK)


class Guarded(Hook):
    """A hook whose failure is not the run's.

    make: begins it. A UserError that this raises is passed on, because the user can fix it before training; any other error is printed, and
    the hook left out.
    """

    def __init__(self, name: str, make: Callable[[], Hook]):
        self.name = name
        self.hook: Hook | None = None
        self._lock = threading.Lock()
        self._begin(make)

    def on_step(self, iteration: int, metrics: dict[str, Any]) -> None:
        self._tell("on_step", iteration, metrics)

    def on_eval(self, iteration: int, metrics: dict[str, Any]) -> None:
        self._tell("on_eval", iteration, metrics)

    def on_samples(self, iteration: int, samples: Sequence[Sample]) -> None:
        self._tell("on_samples", iteration, samples)

    def on_save(self, iteration: int, folder: Path) -> None:
        self._tell("on_save", iteration, folder)

    def on_end(self) -> None:
        self._tell("on_end")

    def _begin(self, make: Callable[[], Hook]) -> None:
        def begin() -> None:
            self.hook = make()

        attempt(self.name, begin)

    def _tell(self, what: str, *values: Any) -> None:
        if self.hook is None:
            return
        try:
            getattr(self.hook, what)(*values)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: BaseException | str) -> None:
        with self._lock:
            hook, self.hook = self.hook, None
        if hook is None:
            return  # by another thread, meanwhile
        give_up(self.name, error)
        with contextlib.suppress(Exception):
            hook.abandon()


class Aside(Guarded):
    """A hook that works in a separate thread: the run passes the values to log and does not wait."""

    def _begin(self, make: Callable[[], Hook]) -> None:
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        self._busy_since: float | None = None
        self._begun, self._ended = threading.Event(), threading.Event()
        self._mistake: UserError | None = None
        threading.Thread(target=self._work, args=(make,), name=self.name, daemon=True).start()
        if not self._begun.wait(TO_START):
            self._calls.put(None)
            self._ended.set()
            give_up(self.name, f"has not begun within {TO_START:.0f} s")
        if self._mistake:
            raise self._mistake

    def _tell(self, what: str, *values: Any) -> None:
        since = self._busy_since
        if since is not None and time.monotonic() - since > TO_ANSWER:
            self._give_up(f"does not answer, for {TO_ANSWER:.0f} s")
        if self.hook is None or self._ended.is_set():
            return
        self._calls.put((what, values))
        if what == "on_end" and not self._ended.wait(TO_FINISH):
            self._give_up(f"has not finished within {TO_FINISH:.0f} s")

    def _work(self, make: Callable[[], Hook]) -> None:
        try:
            hook = make()
        except UserError as error:
            self._mistake = error
        except BaseException as error:  # in this thread only the logger can raise SystemExit
            if not self._ended.is_set():
                give_up(self.name, error)
        else:
            if self._ended.is_set():  # too late, it is not used any more
                hook.abandon()
                return
            self.hook = hook
        finally:
            self._begun.set()
        while self.hook is not None and (call := self._calls.get()):
            self._do(*call)
        self._ended.set()

    def _do(self, what: str, values: tuple) -> None:
        hook = self.hook
        self._busy_since = time.monotonic()
        try:
            if hook is not None:
                getattr(hook, what)(*values)
        except BaseException as error:
            self._give_up(error)
        finally:
            self._busy_since = None
        if what == "on_end":
            self._ended.set()


def _reason(error: BaseException | str) -> str:
    """Return the reason in one line: the message of the system, else the kind of the exception and its message."""
    if isinstance(error, str):
        return error
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

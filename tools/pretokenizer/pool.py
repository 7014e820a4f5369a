"""A pool of worker processes that returns results in the order of the tasks and works only a few tasks ahead.

With one worker the work is done in this process. On Linux processes are forked, which takes no time, if this one has a single thread;
else they are spawned, since a fork can inherit a lock that nobody opens.
"""

import contextlib
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from megatron_ft.errors import DataError

AHEAD = 3  # tasks per worker that are queued or finished before their results are needed


class Pool:
    """here: the object whose methods do the work. make: a picklable function that returns such an object in a spawned worker."""

    def __init__(self, workers: int, make: Any, *arguments: Any, here: Any):
        self.workers, self._here, self._executor = workers, here, None
        if workers > 1:
            from concurrent.futures import ProcessPoolExecutor
            from multiprocessing import get_context

            # Threads of the Rust tokenizer would compete with the other workers.
            with _environment(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1"):
                way, start = ("fork", (_itself, (here,))) if can_fork() else ("spawn", (make, arguments))
                self._executor = ProcessPoolExecutor(workers, get_context(way), _start, start)
                for future in [self._executor.submit(_ready) for _ in range(workers)]:
                    self._result(future)

    def map(self, method: str, tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Yield the results of the worker's method for each task. Raise its exceptions, and DataError if a worker was killed."""
        if self._executor is None:
            yield from (getattr(self._here, method)(*task) for task in tasks)
            return
        waiting: deque[Any] = deque()
        for task in tasks:
            waiting.append(self._executor.submit(_work, method, task))
            if len(waiting) >= self.workers * AHEAD:
                yield self._result(waiting.popleft())
        while waiting:
            yield self._result(waiting.popleft())

    def finish(self) -> None:
        """Let the workers end, without waiting for them: there are no more tasks."""
        if self._executor is not None:
            self._executor.shutdown(wait=False)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def _result(self, future: Any) -> Any:
        from concurrent.futures.process import BrokenProcessPool

        try:
            return future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed, probably because memory was full; start again with fewer --workers"
            ) from error


_WORKER: Any = None


def _start(make: Any, arguments: tuple[Any, ...]) -> None:
    global _WORKER
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _WORKER = make(*arguments)


def _itself(here: Any) -> Any:
    return here


def can_fork() -> bool:
    """Return whether a copy of this process works: Linux, and no other Python thread that could hold a lock."""
    return sys.platform == "linux" and threading.active_count() == 1


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _ready() -> None:
    """Do nothing; its result shows that the worker has started."""


def _work(method: str, task: tuple[Any, ...]) -> Any:
    return getattr(_WORKER, method)(*task)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables for child processes, without changing those already set."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""Worker processes that take tasks and give results in the order of the tasks, a few ahead and no more.

One worker means none: the work is done here. Processes are started afresh rather than forked, so that nothing this
process holds (threads, open files) is inherited. Knows nothing of what the work is.
"""

import contextlib
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from megatron_ft.errors import DataError

AHEAD = 3  # tasks per worker that are waiting or done before their turn


class Pool:
    """make: called once in each worker (a picklable function), gives the object whose methods do the work."""

    def __init__(self, workers: int, make: Any, *arguments: Any, here: Any = None):
        self.workers, self._here, self._executor = workers, here, None
        if workers > 1:
            from concurrent.futures import ProcessPoolExecutor
            from multiprocessing import get_context

            # Rust's own threads would only compete with the other workers.
            with _environment(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1"):
                self._executor = ProcessPoolExecutor(workers, get_context("spawn"), _start, (make, arguments))
                for future in [self._executor.submit(_ready) for _ in range(workers)]:
                    self._result(future)

    def map(self, method: str, tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Call the worker's method with each task. Raises what it raises; DataError where a worker was killed."""
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
                "a worker process was killed, which happens where memory runs out; start again with fewer --workers"
            ) from error


_WORKER: Any = None


def _start(make: Any, arguments: tuple[Any, ...]) -> None:
    global _WORKER
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _WORKER = make(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _ready() -> None:
    """Something to wait for."""


def _work(method: str, task: tuple[Any, ...]) -> Any:
    return getattr(_WORKER, method)(*task)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Variables that child processes see; those that are set already stay."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

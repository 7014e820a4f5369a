"""A pool of ranks for tests: the engine is imported once, the ranks are forked from it and kept for a whole module.

Every wait has a deadline; a rank that fails, dies or hangs makes `run` raise with that rank's own traceback, and the pool is gone.
"""

import atexit
import contextlib
import ctypes
import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import time
import traceback

import torch
import torch.distributed as dist

from megatron_ft import device
from megatron_ft.engine.start import prepare_engine

_FORK = multiprocessing.get_context("fork")


class RankFailed(AssertionError):
    """A rank raised, died or did not answer in time."""


class Ranks:
    """`size` processes, joined. run(function, ...) calls a module-level function on each and gathers what they return."""

    def __init__(self, size: int):
        prepare_engine()
        torch.set_num_threads(1)
        self.size = size
        gc.freeze()  # a collection in a rank would copy what it shares with the others
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self._processes, self._failed = [], [], False
        atexit.register(self.close)
        for rank in range(size):
            ours, theirs = _FORK.Pipe()
            process = _FORK.Process(target=_serve, args=(rank, size, self._folder.name + "/store", theirs))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function, *args, timeout: float = 300.0) -> list:
        """What each rank returned, by rank."""
        for pipe in self._pipes:
            pipe.send((function, args))
        deadline = time.monotonic() + timeout
        waiting, results = set(range(self.size)), [None] * self.size
        while waiting:
            ready = multiprocessing.connection.wait(
                [self._pipes[r] for r in waiting], max(0.0, deadline - time.monotonic())
            )
            if not ready:
                self._fail(f"rank(s) {sorted(waiting)} did not answer within {timeout:.0f} s")
            for rank in [r for r in waiting if self._pipes[r] in ready]:
                results[rank] = self._receive(rank)
                waiting.discard(rank)
        return results

    def _receive(self, rank: int):
        try:
            ok, value = self._pipes[rank].recv()
        except EOFError:
            self._fail(f"rank {rank} died")
        if not ok:
            self._fail(f"rank {rank} raised\n{value}")
        return value

    def _fail(self, message: str):
        self._failed = True
        self.close()
        raise RankFailed(message)

    def close(self) -> None:
        """End the ranks: those that wait for work leave by themselves, the others are killed."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        patience = time.monotonic() + (0.0 if self._failed else 5.0)
        for process in self._processes:
            process.join(max(0.0, patience - time.monotonic()))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            process.join(10)
        self._pipes, self._processes = [], []
        self._folder.cleanup()


def _serve(rank: int, size: int, store: str, pipe) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the tests
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    dist.init_process_group(device.backend(), store=dist.FileStore(store, size), rank=rank, world_size=size)
    while True:
        work = None
        with contextlib.suppress(EOFError):
            work = pipe.recv()
        if work is None:
            os._exit(0)
        function, args = work
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))

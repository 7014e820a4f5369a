"""Ranks on this machine's CPU: the engine is imported once, the ranks are forked from that process and connected through a file.

The process should do nothing else, because threads that were started before do not survive a fork.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

from megatron_ft import device
from megatron_ft.engine.start import prepare_engine
from megatron_ft.errors import UserError

_FORK = multiprocessing.get_context("fork")


def run_forked(size: int, function: Callable[[Any], Any], argument: Any) -> list[Any]:
    """Return what function(argument) returns on each of `size` ranks, by rank.

    Raise the first rank's user error as it is; RuntimeError, with the rank's traceback or end, for any other. No process is left.
    """
    import torch

    prepare_engine()
    torch.set_num_threads(1)  # so many processes need no threads, and forked ones cannot have them
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        try:
            for rank in range(size):
                ours, theirs = _FORK.Pipe(duplex=False)
                job = (rank, size, os.path.join(folder, "store"), theirs, function, argument)
                processes.append(_FORK.Process(target=_rank, args=job))
                processes[-1].start()
                theirs.close()
                pipes.append(ours)
            return _gather(pipes)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _gather(pipes: list) -> list[Any]:
    """Return the results by rank; the first failure ends the wait."""
    results: list[Any] = [None] * len(pipes)
    waiting = dict(zip(pipes, range(len(pipes)), strict=True))
    while waiting:
        ready: list[Any] = multiprocessing.connection.wait(list(waiting))
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                kind, value = pipe.recv()
            except EOFError:
                raise RuntimeError(f"rank {rank} of {len(pipes)} died") from None
            if kind == "mistake":
                raise value
            if kind == "bug":
                raise RuntimeError(f"rank {rank} of {len(pipes)} raised\n{value}")
            results[rank] = value
    return results


def _rank(rank: int, size: int, store: str, pipe: Any, function: Callable[[Any], Any], argument: Any) -> None:
    import torch.distributed as dist

    die_with_parent()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group(device.backend(), store=dist.FileStore(store, size), rank=rank, world_size=size)
        answer = "result", function(argument)
    except UserError as error:
        answer = "mistake", error
    except BaseException:
        answer = "bug", traceback.format_exc()
    pipe.send(answer)
    os._exit(0)


def die_with_parent() -> None:
    """Make the system kill this process when the one that started it ends for any reason. Only on Linux; elsewhere do nothing."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

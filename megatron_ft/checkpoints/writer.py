"""Writes one rank's files of a checkpoint, in this process or in a forked one while training continues.

A forked writer has the memory as it was at the fork, whatever the optimizer does meanwhile. It ends with its trainer. This module handles
files and processes; saver.py defines their content and commits the checkpoint.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from megatron_ft.digests import Entry, digest_files
from megatron_ft.engine.collective_errors import refusal
from megatron_ft.errors import CheckpointError, PassingFault, UserError
from megatron_ft.files import naming

_PR_SET_PDEATHSIG = 1
_PATIENCE = 10.0
"""Seconds in which a killed writer ends, unless it waits for a disk that does not respond."""


@dataclass
class Part:
    """The files that one rank writes into the folder of a checkpoint. put: relative name -> function that writes that path."""

    folder: Path
    put: dict[str, Callable[[Path], Any]] = field(default_factory=dict)
    buckets: list = field(default_factory=list)
    """The engine's: (path, name, (objects, tensors)) for each file of tensors, in host memory."""
    transforms: list = field(default_factory=list)
    """The engine's transforms of a stream of tensors; by default none."""


@dataclass(frozen=True)
class Written:
    """The files that a rank has written: digests by file, and the place of each tensor, for the engine's metadata."""

    digests: dict[str, Entry]
    places: list


def write(part: Part) -> Written:
    """Write all files of a part and flush them to the disk. Raise OSError if the system refuses, CheckpointError if the folder does not
    exist.
    """
    if not part.folder.is_dir():  # the main rank has created it; do not create it on another disk
        raise CheckpointError(
            f"{part.folder.parent} is not the folder that the first process writes to: --save must be on a disk that all machines share"
        )
    for name, put in part.put.items():
        path = part.folder / name
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            put(path)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    places = _write_buckets(part)
    return Written(digest_files(part.folder, [*part.put, *(name for _, name, _ in part.buckets)]), places)


def save_tensors(value: Any, path: Path) -> None:
    """Call torch.save for a new file. Raise OSError if the system refuses."""
    with open(path, "wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:
            raise _system_error(error, path) from error


def _system_error(error: BaseException, path: Path) -> BaseException:
    """Return the system's error behind an error of torch's file writer, which only states that the end is missing."""
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, OSError):
            return behind
        behind = behind.__cause__ or behind.__context__
    if "inline_container" in str(error):  # in its message for a file that is too short
        return OSError(errno.EIO, "the disk did not take all that was written", str(path))
    return error


def _write_buckets(part: Part) -> list:
    """Write tensors with the engine's code in this process. If one of its worker processes were killed, the engine would hang."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    places = []
    for number, bucket in enumerate(part.buckets):
        answers: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        pending: queue.Queue[int] = queue.Queue()
        pending.put(number)
        FileSystemWriterAsync.write_preloaded_data(part.transforms, number, bucket, answers, pending, use_fsync=True)
        _, found = answers.get()
        if isinstance(found, Exception):
            with naming(Path(bucket[0])):
                raise _system_error(found, Path(bucket[0])) from found
        places += found
    return places


class Here:
    """The part is written before the constructor returns."""

    def __init__(self, part: Part):
        self.problem: Exception | None = None
        self.written: Written | None = None
        try:
            self.written = write(part)
        except Exception as error:
            self.problem = error

    def running(self) -> bool:
        return False

    def wait(self) -> None: ...
    def abandon(self) -> None: ...


class Forked:
    """The part is written by a separate process; `problem` or `written` is set after it has ended."""

    def __init__(self, part: Part):
        self.problem: Exception | None = None
        self.written: Written | None = None
        try:
            self._start(part)
        except OSError as error:  # no memory or no process left; the other ranks have to hear of it
            self.problem = error

    def _start(self, part: Part) -> None:
        context = multiprocessing.get_context("fork")
        self._answer, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_serve, args=(part, theirs), name="checkpoint writer", daemon=True)
        with theirs, _without_collection():
            self._process.start()

    def running(self) -> bool:
        if self.problem is None and self.written is None and self._answer.poll():
            self._receive()
        return self.problem is None and self.written is None

    def wait(self) -> None:
        if self.running():
            self._receive()

    def abandon(self) -> None:
        """Kill the writer. Its output is not used. A writer that waits for a disk is not waited for."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join(_PATIENCE)

    def _receive(self) -> None:
        try:
            found = self._answer.recv()
        except EOFError:
            self._process.join()
            found = PassingFault(
                f"the process that wrote a checkpoint in the background ended with {_ending(self._process.exitcode)}: "
                f"earlier checkpoints are intact; run again with --auto_resume (without --async_save if it was short of memory)"
            )
        else:
            self._process.join()
        if isinstance(found, Written):
            self.written = found
        else:
            self.problem = found


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Fork within it. A new process in which the garbage collector is never enabled cannot destroy the trainer's objects, whose threads
    and GPU it does not have: that ends it with SIGSEGV.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _serve(part: Part, answer: Connection) -> None:
    """Run the writer process. It ends with its parent and ignores the signals that request a save from a trainer."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    try:
        found: Any = write(part)
    except UserError as error:
        found = error
    except OSError as error:
        found = refusal(error)
    except Exception as error:
        found = RuntimeError(f"{type(error).__name__}: {error}")
    with contextlib.suppress(BrokenPipeError):
        answer.send(found)
    answer.close()
    os._exit(0)  # skip the exit handlers that the trainer has registered


def _ending(code: int | None) -> str:
    return f"signal {-code} ({signal.Signals(-code).name})" if code and code < 0 else f"exit code {code}"

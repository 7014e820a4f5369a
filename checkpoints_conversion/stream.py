"""Writes models larger than memory: files of known size, which several threads fill tensor by tensor, in any format.

A file gets its name only when it is complete and on disk, so files that an interrupted run has finished are not written again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from megatron_ft import files
from megatron_ft.digests import Entry, digest_files, files_below, write_manifest
from megatron_ft.errors import CheckpointError, UserError
from megatron_ft.models.weights import Placed
from megatron_ft.wording import part_of, size

WORKERS = max(1, min(4, os.cpu_count() or 1))
_PLAN = ".plan"


@dataclass
class Unit:
    """Files that are written together, such as those of one pipeline stage."""

    files: dict[Path, int]
    """Path -> bytes."""
    tasks: list[tuple[Placed, Callable[[list[int], Tensor], None]]]
    """Functions that write each whole tensor to the open files, which are in order."""
    finish: Callable[[list[int]], None] = lambda handles: None
    tensors: list[tuple[str, tuple[int, ...], int]] = field(default_factory=list)
    """The tensors of each of its files: (name, shape, bytes), for plans."""

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())

    def is_done(self) -> bool:
        return all(path.is_file() and path.stat().st_size == size for path, size in self.files.items())


def write_units(
    units: Sequence[Unit], full: Callable[[Placed], Tensor], what: str = "converting", workers: int = WORKERS
) -> dict[Path, Entry]:
    """Write all files that do not exist yet. Return size and digest of every file. Each worker holds a few tensors in memory.

    A file's digest is computed while it is in the page cache. Raise CheckpointError if the disk is or becomes full.
    """
    waiting = [unit for unit in units if not unit.is_done()]
    if waiting:
        check_disk(next(iter(waiting[0].files)), sum(unit.nbytes for unit in waiting))
    progress = Progress(what, sum(unit.nbytes for unit in waiting))
    with ThreadPoolExecutor(workers) as pool, disk_errors(), progress:
        digests = {}
        for unit in units:
            if unit in waiting:
                _write(unit, full, pool, progress)
            digests.update({path: pool.submit(_entry, path) for path in unit.files})
        return {path: digest.result() for path, digest in digests.items()}


def _entry(path: Path) -> Entry:
    return digest_files(path.parent, [path.name])[path.name]


def seal(folder: Path, known: Mapping[Path, Entry], but: Sequence[str] = ()) -> None:
    """Write digests.json of a finished folder. known: entries that are used as they are; all other files are read.

    but: files that are left out, because their owner may edit them.
    """
    entries = {path.relative_to(folder).as_posix(): entry for path, entry in known.items()}
    others = [name for name in files_below(folder) if name not in entries and name not in (_PLAN, *but)]
    write_manifest(folder, {**entries, **digest_files(folder, others)})


def _write(unit: Unit, full: Callable[[Placed], Tensor], pool: ThreadPoolExecutor, progress: Progress) -> None:
    parts = [path.with_name(path.name + ".part") for path in unit.files]
    with contextlib.ExitStack() as stack:
        handles = []
        for part, size in zip(parts, unit.files.values(), strict=True):
            part.parent.mkdir(parents=True, exist_ok=True)
            handles.append(os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666))
            stack.callback(os.close, handles[-1])
            os.truncate(handles[-1], size)
        share = unit.nbytes / max(1, len(unit.tasks))
        stop = threading.Event()

        def do(task: tuple[Placed, Callable[[list[int], Tensor], None]]) -> None:
            if not stop.is_set():
                placed, put = task
                put(handles, full(placed))
                progress.add(share)

        futures = [pool.submit(do, task) for task in unit.tasks]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise
        unit.finish(handles)
        for handle in handles:
            os.fsync(handle)
    for part, path in zip(parts, unit.files, strict=True):
        os.replace(part, path)


def check_disk(path: Path, needed: int) -> None:
    """Raise CheckpointError unless the disk of a file has so many bytes."""
    folder = next(parent for parent in path.parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder}: {size(needed)} are needed, {size(free)} are free: free disk space or choose another disk"
        )


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Raise CheckpointError where the disk becomes full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise CheckpointError(f"the disk is full ({error.strerror}): free disk space or choose another disk") from error


class Progress:
    """Prints progress: on a terminal a line updated several times per second, else a line every half minute."""

    def __init__(self, what: str, total: float):
        self.what, self.total, self.done = what, total, 0.0
        self._lock, self._tty = threading.Lock(), sys.stderr.isatty()
        self._started = time.monotonic()
        self._printed = self._started
        self._open = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            print(f"\r{self.line()}", file=sys.stderr)

    def add(self, count: float) -> None:
        with self._lock:
            self.done += count
            now = time.monotonic()
            if now - self._printed < (0.2 if self._tty else 30):
                return
            self._printed = now
            self._open = self._tty
            print(f"\r{self.line()}" if self._tty else self.line(), end="" if self._tty else "\n", file=sys.stderr)

    def line(self) -> str:
        """Return "converting 3.2 of 13.5 GB, 0.85 GB/s, 0:12 left"."""
        speed = self.done / max(1e-9, time.monotonic() - self._started)
        left = round((self.total - self.done) / speed) if speed else 0
        return f"{self.what} {part_of(self.done, self.total)}, {size(speed)}/s, {left // 60}:{left % 60:02d} left "


@contextlib.contextmanager
def resumable_folder(target: Path, key: dict, overwrite: bool) -> Iterator[Path]:
    """Yield a folder beside `target` that replaces it if the block ends without an error.

    The files of an interrupted run are reused if its `key` (options and source) was the same. After a UserError the folder is removed.
    Raise CheckpointError while another process writes there.
    """
    target = Path(target)
    if not overwrite:
        files.refuse_existing(target)
    work = target.with_name(f".{target.name}.partial")
    work.parent.mkdir(parents=True, exist_ok=True)
    work.mkdir(exist_ok=True)
    with open(work / _PLAN, "a+") as plan:
        try:
            fcntl.flock(plan, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(
                f"another conversion is writing {target}: wait until it ends, or choose another folder"
            ) from error
        text = json.dumps(key, sort_keys=True, default=str)
        plan.seek(0)
        if plan.read() != text:
            _empty(work)
            plan.truncate(0)
            plan.write(text)
            plan.flush()
        try:
            yield work
            (work / _PLAN).unlink()
            files.replace_folder(work, target, overwrite)
        except UserError:
            shutil.rmtree(work, ignore_errors=True)
            raise


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name != _PLAN:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def identity(paths: Iterable[Path]) -> list:
    """Return path, size and modification time of files, sorted by path, which identify the source of a conversion."""
    return [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(set(paths))]

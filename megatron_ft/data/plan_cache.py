"""Stores plans of epochs in files that all processes of a machine map, and that the next start of the run reuses.

A plan is a few arrays of numbers. Its file has their lengths, a hash and the arrays in sequence; it is written atomically and never
changed. One process builds it while the others wait. If nothing can be written, the plan stays in memory. The meaning of the numbers does
not matter here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ft.data.fingerprint import fingerprint
from megatron_ft.files import atomic_file
from megatron_ft.log import logger

KEPT = 16  # files in a folder; the oldest go first
_HEAD = 3  # numbers before the lengths of the arrays: hash (two), how many arrays
log = logger("data")

Arrays = Sequence[np.ndarray]
"""int64, one dimension each."""


def cached(folder: Path, key: Any, build: Callable[[], Arrays]) -> Arrays:
    """Return the result of build() for this key, which must contain all its inputs; read-only, and mapped if it was stored."""
    path = folder / f"{fingerprint(key).removeprefix('xxh3:')}.npy"
    if (found := _read(path)) is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if (found := _read(path)) is None:
                arrays = build()
                _write(path, arrays)
                _prune(folder, path)
                found = _read(path)
            return found if found is not None else arrays
    except OSError as error:
        log.debug("%s: plans stay in memory (%s)", folder, error)
        return build()


def _write(path: Path, arrays: Arrays) -> None:
    lengths = [len(array) for array in arrays]
    content = np.concatenate([[0, 0, len(arrays), *lengths], *arrays]).astype(np.int64, copy=False)
    content[:2] = _hash(content)
    with atomic_file(path) as file:
        np.save(file, content)


def _read(path: Path) -> Arrays | None:
    """Return the arrays in a file; None if it does not exist or is incomplete, and must be written again."""
    try:
        content = np.load(path, mmap_mode="r")
        if content.dtype == np.int64 and content.ndim == 1 and (content[:2] == _hash(content)).all():
            ends = np.cumsum(content[_HEAD : _HEAD + int(content[2])])
            return np.split(content[_HEAD + int(content[2]) :], ends[:-1])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, IndexError, EOFError):
        pass
    log.warning("%s: a damaged plan, made anew", path)
    with contextlib.suppress(OSError):
        path.unlink()
    return None


def _hash(content: np.ndarray) -> np.ndarray:
    """Return the hash of everything except the hash itself: int64 [2]."""
    import xxhash

    return np.frombuffer(xxhash.xxh3_128_digest(content[2:].data), np.int64)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process of this machine run the block at a time, if the file system has locks. A dead process releases its lock."""
    import fcntl

    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _prune(folder: Path, newest: Path) -> None:
    """Delete old files. Processes that have mapped one keep it until they end."""
    files = sorted((path for path in folder.glob("*.npy") if path != newest), key=lambda path: path.stat().st_mtime)
    for path in files[: -(KEPT - 1)]:
        path.unlink(missing_ok=True)

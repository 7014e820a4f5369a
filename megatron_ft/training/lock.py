"""One job a folder: the main rank holds a lock on --save while a run writes there, and cleans up what a killed one left.

The lock is the system's (flock): it ends with the process that holds it, however that ends, and nothing has to be removed by hand.
Background writers share it, so that a folder is free only when the last process that writes there is gone.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import IO

from megatron_ft.errors import CheckpointError
from megatron_ft.log import logger
from megatron_ft.parallel import Layout
from megatron_ft.together import raise_together

log = logger("checkpoint")

LOCK = ".lock"
_PATIENCE = 5.0
"""Seconds that a job which was just killed has for its last process to end."""
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


class FolderLock:
    """A context manager, on all ranks together. Raises CheckpointError on all where another job holds the folder, or it cannot be
    written.
    """

    def __init__(self, root: Path, layout: Layout):
        self.root, self.layout = Path(root), layout
        self._file: IO | None = None

    def __enter__(self) -> FolderLock:
        problem = None
        if self.layout.is_main:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                self._file = _acquire(self.root / LOCK)
                sweep(self.root)
            except (CheckpointError, OSError) as error:
                problem = error
        raise_together(problem)
        return self

    def __exit__(self, *_) -> None:
        if self._file:
            self._file.truncate(0)
            self._file.close()


def _acquire(path: Path) -> IO:
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - open for the whole run
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in _NO_LOCKS:
                log.warning(f"{path.parent} lies where files cannot be locked: take care that no other job saves there")
                break
            if time.monotonic() > deadline:
                holder = _holder(file)
                file.close()
                raise CheckpointError(
                    f"{path.parent} is in use by another job{holder}: give this one a --save folder of its own, or end that one first"
                ) from error
        time.sleep(0.2)
    file.truncate(0)
    json.dump({"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}, file)
    file.flush()
    return file


def _holder(file: IO) -> str:
    """Who says to hold it: " (process 12 on node3)"."""
    file.seek(0)
    try:
        said = json.loads(file.read())
        job = f", job {said['job']}" if said.get("job") else ""
        return f" (process {said['pid']} on {said['host']}{job})"
    except (ValueError, KeyError, TypeError):
        return ""


def sweep(root: Path) -> None:
    """Delete what saves that were killed left under temporary names. Only with the lock: another job's may be at work."""
    for left in [*root.glob(".iter_*.tmp-*"), *root.glob(".latest_checkpointed_iteration.txt.tmp-*")]:
        log.info(f"removing {left.name}, which an unfinished save left")
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)

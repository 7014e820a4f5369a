"""One job per folder: the main rank holds a lock on --save while a run writes there, and removes what a killed run left.

It is a lock of the system (flock), which is released when its process ends for any reason; nothing has to be removed by hand. Background
writers share it, so a folder is free only when the last process that writes there has ended.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import IO

from megatron_ft.engine.collective_errors import raise_together
from megatron_ft.engine.parallel import Layout
from megatron_ft.errors import CheckpointError, PassingFault
from megatron_ft.log import logger

log = logger("checkpoint")

LOCK = ".lock"
_PATIENCE = 5.0
"""Seconds that a job which was just killed has for its last process to end."""
_PATIENCE_WITH_OURSELVES = 120.0
"""The same for an earlier start of this very SLURM job, which the scheduler has ended or is about to."""
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


class FolderLock:
    """A context manager, on all ranks together. Raise CheckpointError on all where another job holds the folder, or it cannot be
    written. A folder that it made is gone again if nothing came into it.
    """

    def __init__(self, root: Path, layout: Layout):
        self.root, self.layout = Path(root), layout
        self._file: IO | None = None
        self._made = False

    def __enter__(self) -> FolderLock:
        problem = None
        if self.layout.is_main:
            try:
                self._made = not self.root.exists()
                self.root.mkdir(parents=True, exist_ok=True)
                self._file, locked = _acquire(self.root / LOCK)
                if locked:
                    sweep(self.root)
            except (CheckpointError, OSError) as error:
                problem = error
        raise_together(problem)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.truncate(0)
            if self._made and [path.name for path in self.root.iterdir()] == [LOCK]:
                with contextlib.suppress(OSError):
                    (self.root / LOCK).unlink()
                    self.root.rmdir()
            self._file.close()


def _acquire(path: Path) -> tuple[IO, bool]:
    """Return (the lock file, whether it is locked: some file systems cannot). Raise CheckpointError if another job holds it."""
    started = time.monotonic()
    while True:
        try:
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - open for the whole run
        except FileNotFoundError:  # its holder has removed it, with the folder that it had made
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        locked = False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # If this is false, it was removed meanwhile.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                locked = True
                break
        except OSError as error:
            if error.errno in _NO_LOCKS:
                log.warning(f"{path.parent} is on a file system without locks: make sure that no other job saves there")
                break
            holder = _holder(file)
            ours = holder.get("job") is not None and holder["job"] == os.environ.get("SLURM_JOB_ID")
            if time.monotonic() - started > (_PATIENCE_WITH_OURSELVES if ours else _PATIENCE):
                file.close()
                raise _in_use(path.parent, holder, ours) from error
        file.close()
        time.sleep(0.2)
    file.truncate(0)
    json.dump({"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}, file)
    file.flush()
    return file, locked


def _holder(file: IO) -> dict:
    """Return the holder that is written in it: pid, host, job; {} where there is none."""
    file.seek(0)
    try:
        holder = json.loads(file.read())
        return {"pid": holder["pid"], "host": holder["host"], "job": holder.get("job")}
    except (ValueError, KeyError, TypeError):
        return {}


def _in_use(root: Path, holder: dict, ours: bool) -> CheckpointError:
    job = f", job {holder['job']}" if holder.get("job") else ""
    who = f" (process {holder['pid']} on {holder['host']}{job})" if holder else ""
    if ours:  # this job was started again while a process of its last start still runs
        return PassingFault(
            f"{root} is still in use by an earlier start of this job{who}: end that process, then start again"
        )
    return CheckpointError(f"{root} is in use by another job{who}: use another --save folder, or end that job first")


def sweep(root: Path) -> None:
    """Delete what saves that were killed left under temporary names. Only with the lock: another job's may be at work."""
    for left in [*root.glob(".iter_*.tmp-*"), *root.glob(".latest_checkpointed_iteration.txt.tmp-*")]:
        log.info(f"removing {left.name}, which an unfinished save left")
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)

"""Commits a checkpoint: all ranks write their part, then the main rank commits it. Earlier checkpoints stay until then.

    .iter_0000500.tmp-PID-RANDOM/      made by the main rank; every rank writes its files there, flushed, and digests them
    .../.metadata, metadata.json       by the main rank, once every rank is done
    .../digests.json                   written under a temporary name and renamed: now the folder is complete
    iter_0000500/                      the folder renamed
    latest_checkpointed_iteration.txt  replaced

If a rank cannot write, all ranks raise. A kill at any time leaves a folder that is not used. With background writers the same happens at
the first step after the last of them has finished.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch.distributed as dist

from megatron_ft import device
from megatron_ft.checkpoints.folder import find_checkpoint, iteration_folder, iterations_in, write_tracker
from megatron_ft.checkpoints.writer import Forked, Here, Part
from megatron_ft.digests import Entry, write_manifest
from megatron_ft.engine.collective_errors import raise_together
from megatron_ft.engine.parallel import Layout
from megatron_ft.errors import CheckpointError, UserError
from megatron_ft.files import replace_folder, temporary_name
from megatron_ft.log import logger

log = logger("checkpoint")

_PATIENCE = 10.0
"""Seconds that a shared disk has to show what another machine wrote."""


class Plan(NamedTuple):
    """A save as one rank sees it. finish: given all ranks' places, the main rank writes the rest and returns its digests."""

    part: Part
    finish: Callable[[list[list]], dict[str, Entry]]


class Keep(NamedTuple):
    """The checkpoints that are kept: the newest `last` (None: all), and always those at multiples of `every`."""

    last: int | None = None
    every: int | None = None


class Saved(NamedTuple):
    """A committed checkpoint."""

    iteration: int
    folder: Path


class Reached(Protocol):
    """The progress of a run (training_state.Progress), as far as a save needs it."""

    @property
    def iteration(self) -> int: ...


class Saver:
    """Saves into one root. All ranks make one and call each method together.

    prepare: (temporary folder, progress) -> what this rank writes. A context manager: leaving it drops a save that is not committed.
    """

    def __init__(self, root: Path, layout: Layout, prepare: Callable[..., Plan], asynchronous: bool, keep: Keep):
        self.root, self.layout, self.prepare, self.keep = Path(root), layout, prepare, keep
        self._writer = Forked if asynchronous else Here
        self._pending: _Pending | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pending:
            self._pending.writer.abandon()
            self._drop(self._pending.folder)
            self._pending = None

    def save(self, progress: Reached) -> list[Saved]:
        """Begin to save; returns what was committed meanwhile. Without background writers, this one too."""
        done = self.committed(wait=True)
        folder = self._new_folder(iteration_folder(self.root, progress.iteration))
        plan = self._prepared(folder, progress)
        device.synchronize()
        self._pending = _Pending(progress.iteration, folder, self._writer(plan.part), plan)
        return done + self.committed(wait=self._writer is Here)

    def _prepared(self, folder: Path, progress: Reached) -> Plan:
        """Return this rank's plan. If a rank cannot make its own, whatever the reason, all ranks raise and the folder is gone."""
        plan, problem = None, None
        try:
            plan = self.prepare(folder, progress)
        except Exception as error:
            problem = error
        try:
            raise_together(problem)
        except BaseException:
            self._drop(folder)
            raise
        assert plan is not None
        return plan

    def committed(self, wait: bool = False) -> list[Saved]:
        """Return the current save if it is finished and committed; with `wait`, wait for it.

        Raise CheckpointError on all ranks if a rank could not write, or its writer process died.
        """
        if self._pending is None:
            return []
        if wait:
            self._pending.writer.wait()
        if _still_running(self._pending.writer):
            return []
        pending, self._pending = self._pending, None
        try:
            raise_together(pending.writer.problem)
            saved = Saved(pending.iteration, self._commit(pending))
        except BaseException:
            self._drop(pending.folder)
            raise
        self._prune(pending.iteration)
        return [saved]

    def _commit(self, pending: _Pending) -> Path:
        everyone: list[Any] = [None] * self.layout.world_size if self.layout.is_main else []
        dist.gather_object(pending.writer.written, everyone or None)
        target, problem = iteration_folder(self.root, pending.iteration), None
        if self.layout.is_main:
            try:
                digests = pending.plan.finish([rank.places for rank in everyone])
                for rank in everyone:
                    digests |= rank.digests
                _check_there(pending.folder, digests)
                write_manifest(pending.folder, digests)
                replace_folder(pending.folder, target, overwrite=True)
                write_tracker(self.root, pending.iteration)
            except Exception as error:
                problem = error
        raise_together(problem)
        return target

    def _new_folder(self, target: Path) -> Path:
        folder: list[Any] = [None]
        problem = None
        if self.layout.is_main:
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                folder = [temporary_name(target)]
                folder[0].mkdir()
            except Exception as error:
                problem = error
        raise_together(problem)
        dist.broadcast_object_list(folder, src=0)
        return folder[0]

    def _drop(self, folder: Path) -> None:
        if self.layout.is_main:
            shutil.rmtree(folder, ignore_errors=True)

    def _prune(self, newest: int) -> None:
        """Delete what is not to be kept. Folders above `newest` are of a time before the run went back: not touched, nor counted."""
        if self.keep.last is None:
            return
        if self.layout.is_main:
            try:
                tracked = find_checkpoint(self.root)
                names = iterations_in(self.root)
            except (OSError, UserError) as error:
                log.warning(f"older checkpoints stay, for now: {error}")
                names = {}
            old = sorted(number for number in names if number <= newest)[: -self.keep.last]
            for number in old:
                if names[number] != tracked.name and not (self.keep.every and number % self.keep.every == 0):
                    _remove(self.root / names[number])
        dist.barrier()


def _still_running(writer: Here | Forked) -> bool:
    """Return whether any rank's writer is at work and none has failed."""
    running = writer.running()
    state = device.handed([int(running), int(writer.problem is not None)])
    dist.all_reduce(state, op=dist.ReduceOp.MAX)
    anyone_runs, anyone_failed = state.tolist()
    if anyone_failed and running:
        writer.abandon()
    return bool(anyone_runs) and not anyone_failed


def _check_there(folder: Path, entries: dict[str, Entry]) -> None:
    """Raise CheckpointError unless the main rank sees every rank's files. Files on the local disk of another machine cannot be loaded."""
    deadline = time.monotonic() + _PATIENCE
    for name, entry in entries.items():
        path = folder / name
        while not (path.is_file() and path.stat().st_size == entry.bytes):
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{path} was written by a process, but the first process does not see it: --save must be on a disk that all "
                    f"machines share"
                )
            time.sleep(0.2)


class _Pending(NamedTuple):
    iteration: int
    folder: Path
    writer: Here | Forked
    plan: Plan


def _remove(folder: Path) -> None:
    """Delete a checkpoint: first its name, so that a kill leaves no half of one under it. An error of the system is only logged."""
    try:
        aside = temporary_name(folder)
        folder.rename(aside)
        shutil.rmtree(aside)
    except OSError as error:
        log.warning(f"{folder} could not be deleted ({(error.strerror or str(error)).lower()}); delete it by hand")

"""What ranks do in test_saver.py: small saves in which one thing goes wrong, on one rank or on all."""

import errno
import multiprocessing
import os
import time
from functools import partial
from pathlib import Path
from unittest import mock

from megatron_ft.errors import UserError

BEFORE, FAULTY = 1, 2
"""The iteration of a save that goes well, and of the one that does not."""


def outcome(error: Exception) -> dict:
    """An error as the command line would show it, and the code with which it would end."""
    return {
        "type": type(error).__name__,
        "text": str(error),
        "code": error.exit_code if isinstance(error, UserError) else 1,
    }


def save_with_a_fault(root: str, fault, asynchronous: bool = False) -> dict:
    """Save, save again with `fault`, and once more without: what the second save raises here, and what the third returns.

    fault: (layout, folder) -> this rank's files; called as the second save is prepared.
    """
    from megatron_ft.checkpoints.saver import Keep, Plan, Saver
    from megatron_ft.checkpoints.training_state import Progress
    from megatron_ft.checkpoints.writer import Part
    from megatron_ft.engine.parallel import process_groups

    def prepare(folder, progress):
        files = fault(layout, folder) if progress.iteration == FAULTY else {f"of rank {layout.rank}": touch}
        return Plan(Part(folder, files), lambda _: {})

    with process_groups() as layout, Saver(Path(root), layout, prepare, asynchronous, Keep()) as saver:
        saver.save(Progress(BEFORE, BEFORE))
        saver.committed(wait=True)
        answer = {}
        try:
            saver.save(Progress(FAULTY, FAULTY))
            while not saver.committed():
                time.sleep(0.01)
        except Exception as error:
            answer = outcome(error)
        answer["children"] = len(multiprocessing.active_children())
        done = saver.save(Progress(FAULTY + 1, FAULTY + 1)) + saver.committed(wait=True)
        answer["after"] = [saved.iteration for saved in done]
        return answer


def touch(path: Path) -> None:
    path.touch()


def wait_for_ever(path: Path) -> None:
    time.sleep(3600)


def raising(error: Exception, layout, folder: Path) -> dict:
    """Rank 2 cannot prepare its part."""
    if layout.rank == 2:
        raise error
    return {f"of rank {layout.rank}": touch}


def bug(path: Path) -> None:
    raise LookupError("no such thing")


def bug_in_the_background(layout, folder: Path) -> dict:
    """Rank 2's writer raises what no writer should, while the others' are still at work."""
    return {f"of rank {layout.rank}": bug if layout.rank == 2 else wait_for_ever}


def save_without_a_process(root: str) -> dict:
    """Rank 2 cannot start its background writer; those of the others are at work."""

    def fault(layout, folder):
        if layout.rank == 2:
            refused.start()
        return {f"of rank {layout.rank}": wait_for_ever if layout.rank != 2 else touch}

    def refuse(*_):
        refused.stop()
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    refused = mock.patch.object(os, "fork", refuse)
    return save_with_a_fault(root, fault, asynchronous=True)


def save_without_a_folder(root: str, error: Exception) -> dict:
    """The main rank cannot make the folder."""
    from megatron_ft.checkpoints.saver import Keep, Saver
    from megatron_ft.checkpoints.training_state import Progress
    from megatron_ft.engine.parallel import process_groups

    def refuse(self, *_, **__):
        raise error

    prepared = []
    with process_groups() as layout, Saver(Path(root), layout, prepared.append, False, Keep()) as saver:
        try:
            with mock.patch.object(Path, "mkdir", refuse):
                saver.save(Progress(FAULTY, FAULTY))
        except Exception as caught:
            return outcome(caught) | {"prepared": bool(prepared)}
    return {}


def leave_while_saving(root: str) -> dict:
    """An exception ends the run while its second save is written in the background: what is left of the writers, and for how long."""
    from megatron_ft.checkpoints.saver import Keep, Plan, Saver
    from megatron_ft.checkpoints.training_state import Progress
    from megatron_ft.checkpoints.writer import Part
    from megatron_ft.engine.parallel import process_groups

    def prepare(folder, progress):
        put = touch if progress.iteration == BEFORE else wait_for_ever
        return Plan(Part(folder, {f"of rank {layout.rank}": put}), lambda _: {})

    with process_groups() as layout:
        try:
            with Saver(Path(root), layout, prepare, True, Keep()) as saver:
                saver.save(Progress(BEFORE, BEFORE))
                saver.save(Progress(FAULTY, FAULTY))
                during = len(multiprocessing.active_children())
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            return {"during": during, "after": len(multiprocessing.active_children())}


def save_beside_one_that_stays(root: str) -> dict:
    """Of two checkpoints that are to be deleted the older one cannot be renamed."""
    from benchmarks.small_saves import _plan
    from megatron_ft.checkpoints import saver
    from megatron_ft.checkpoints.training_state import Progress
    from megatron_ft.engine.parallel import process_groups

    rename = Path.rename

    def busy(self, target):
        if self.name == "iter_0000001":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return rename(self, target)

    lines = []
    warnings = mock.patch.object(saver.log, "warning", lines.append)
    with process_groups() as layout, mock.patch.object(Path, "rename", busy), warnings:
        own = saver.Saver(Path(root), layout, partial(_plan, layout), False, saver.Keep(last=1))
        saved = [one.iteration for number in (1, 2, 3) for one in own.save(Progress(number, number))]
    return {"saved": saved, "log": lines}

"""Stops a run for good in the middle of a save: the process that trains is killed at a chosen call of a chosen function."""

import functools
import importlib
import os
import signal
from pathlib import Path


def arm(run: str, module: str, name: str, call: int) -> None:
    """Kill this process at the call-th call of module.name during the second save under `run`; -1: at the one that would
    replace the tracker.

    The function may be called in a process that the engine forks to write files: the one that armed is killed.
    """
    owner, trainer, calls = importlib.import_module(module), os.getpid(), [0]
    function = getattr(owner, name)

    @functools.wraps(function)
    def deadly(*args, **kwargs):
        if _is_second_save(run):
            calls[0] += 1
            about_tracker = any("latest_checkpointed" in str(argument) for argument in args)
            if calls[0] == call or (call == -1 and about_tracker):
                os.kill(trainer, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, deadly)


def _is_second_save(run: str) -> bool:
    tracker = Path(run) / "latest_checkpointed_iteration.txt"
    return tracker.is_file() and tracker.read_text() == "1\n"

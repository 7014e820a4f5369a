"""The process in which checks run: `python -m megatron_ft.doctor.worker --folder F` reads their functions from standard input.

On a CPU it imports the engine once and forks for every check. A process that uses a GPU cannot be forked, so with a GPU the checks run
in the worker itself. After a failed check the runner starts a new worker, because a GPU error affects the whole process.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_ft import device
from megatron_ft.config.cli import Command, run_script
from megatron_ft.doctor.checks import Check
from megatron_ft.doctor.result import Found, failed
from megatron_ft.engine.forked import die_with_parent
from megatron_ft.engine.start import prepare_engine
from megatron_ft.errors import UserError
from megatron_ft.files import read_json, write_json


@dataclass
class Worker:
    """Worker"""

    folder: str = field(default="", metadata={"required": True})
    """folder for the files of the checks and their results"""


COMMAND = Command(name="doctor", summary="runs checks", sections=(Worker,))


def result_file(folder: Path, check: Check) -> Path:
    return folder / f"{check.function.replace(':', '-')}.json"


def run(options: Worker) -> int:
    die_with_parent()
    folder = Path(options.folder)
    for line in sys.stdin:
        check = Check("", line.strip())
        found = serve(check, folder)
        sys.stderr.flush()
        write_json(result_file(folder, check), asdict(found))
    return 0


def serve(check: Check, folder: Path) -> Found:
    """Run a check in a fork on a CPU, in this process on a GPU."""
    try:
        if check.needs_engine:
            prepare_engine()
        in_a_fork = not device.has_gpu()
    except Exception as error:
        return _explained(error)
    if in_a_fork:
        return _forked(check, folder)
    found = outcome(check, folder)
    gc.collect()
    device.empty_cache()
    return found


def outcome(check: Check, folder: Path) -> Found:
    """Return the result of the check's function, or its error as a failed check."""
    try:
        return check.load()(folder)
    except Exception as error:
        return _explained(error)


def _explained(error: Exception) -> Found:
    traceback.print_exc()
    line = " ".join(str(error).split())[:300]
    return failed(line if isinstance(error, UserError) else f"{type(error).__name__}: {line}")


def _forked(check: Check, folder: Path) -> Found:
    theirs = folder / "found.json"
    theirs.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            die_with_parent()
            write_json(theirs, asdict(outcome(check, folder)))
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return exit_failure(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) or Found(**read_json(theirs))


def exit_failure(code: int) -> Found | None:
    """Return a failed check for a nonzero exit code, else None. A negative code is a signal, as in subprocess."""
    if code == 0:
        return None
    return failed(
        f"the process was ended by {signal.Signals(-code).name}"
        if code < 0
        else f"the process ended with exit code {code}"
    )


if __name__ == "__main__":
    sys.exit(run_script(COMMAND, run))

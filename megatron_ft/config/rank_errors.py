"""Error messages of the processes that a launcher started: each machine prints an error once.

The processes of one machine share a folder: that of our launcher, or the one that torchrun makes. The process that first creates a
certain file in it prints the error; the others print nothing. Under torchrun the message is also written to the rank's error file,
which torchrun quotes as the root cause at the end of its report. This module does not import torch.
"""

import contextlib
import faulthandler
import hashlib
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

FOLDER = "MEGATRON_FT_RANKS"
"""Environment variable: the folder that our launcher shares with the processes it started."""
MEETING = "MEGATRON_FT_MEETING"
"""Environment variable of rank 0: the descriptor of a socket that the launcher has bound. Rank 0 listens on it."""
STACK_SIGNAL = signal.SIGUSR2
"""On this signal a process that our launcher started writes its stack, even if it waits outside Python."""

_REPORTED = "reported-"
_LOST = "lost-"
_FAILING = "failing-"
_PATIENCE = 1.5  # seconds in which the process that failed first prints its error
_LOSS_MESSAGES = (
    *("connection closed by peer", "connection reset by peer", "connection refused", "broken pipe", "timed out"),
    *("timeout", "socket timeout", "communicator was aborted", "remote process exited", "connection aborted"),
    *(
        "no route to host",
        "network is unreachable",
        "host is down",
        "endpoint is not connected",
        "connection was closed",
    ),
)
"""Parts of the messages that torch.distributed raises if another process has ended or does not respond."""


def print_once(line: str) -> None:
    """Print an error message to standard error, unless a process of this machine has already printed the same line."""
    _write_torchrun_error_file(line)
    if _create(_REPORTED + hashlib.sha256(line.encode()).hexdigest()[:16]):
        print(line, file=sys.stderr, flush=True)


def should_report(error: BaseException) -> bool:
    """Return whether this process should print the error: it is the first on this machine to report one.

    If the error only shows that another process was lost, our launcher finds and prints the cause. Under another launcher this
    function first waits for the process that is the cause to print its error.
    """
    if is_loss(error):
        if _record_loss(error):
            return False
        if _wait_for_report(_PATIENCE):
            return False
    return _create(_REPORTED + "first") if not _wait_for_report(0) else False


def is_loss(error: BaseException) -> bool:
    """Return whether torch.distributed raised the error because another process has ended or does not respond."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"DistError", "DistBackendError", "DistNetworkError", "DistStoreError"}:
        return True
    broken = any(words in str(error).lower() for words in _LOSS_MESSAGES)
    # It can come from a file server or a web service, not from another process of the run.
    if isinstance(error, OSError):
        return broken and error.filename is None and _raised_in_communication(error)
    return broken and isinstance(error, RuntimeError)


def about_to_fail(error: BaseException) -> None:
    """Notify the launcher that this process will print an error. Call it before connections are closed and other ranks notice."""
    if not is_loss(error):
        _touch(_FAILING + os.environ.get("RANK", "0"))


def has_shared_folder() -> bool:
    """Return whether the processes of this machine share a folder, so that only one of them prints an error."""
    return _folder() is not None


def write_stack_on_signal() -> None:
    """Install a handler that writes the stacks of all threads on STACK_SIGNAL. Do nothing without our launcher."""
    folder = os.environ.get(FOLDER)
    if folder and os.path.isdir(folder):
        faulthandler.enable()
        file = open(stack_file(Path(folder), int(os.environ["RANK"])), "w")  # noqa: SIM115 - stays open until the process ends
        faulthandler.register(STACK_SIGNAL, file=file, all_threads=True)


def stack_file(folder: Path, rank: int) -> Path:
    """Return the file that a rank writes its stack to."""
    return folder / f"stack-{rank}"


def handles_stack_signal(folder: Path, rank: int) -> bool:
    """Return whether a rank has a handler for STACK_SIGNAL, for the launcher. A process without one is ended by the signal."""
    return stack_file(folder, rank).exists()


@dataclass(frozen=True)
class Loss:
    """A rank's note that it lost another one. at: time of the error (s, Unix time). reason: the message of torch.distributed."""

    at: float
    reason: str


def losses(folder: Path) -> dict[int, Loss]:
    """Return the ranks that have lost another one and their notes, for the launcher."""
    found = {}
    for path in folder.glob(f"{_LOST}*"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found[int(path.name.removeprefix(_LOST))] = Loss(**json.loads(path.read_text(encoding="utf-8")))
    return found


def is_failing(folder: Path) -> bool:
    """Return whether a rank is about to print an error, for the launcher."""
    return any(folder.glob(f"{_FAILING}*"))


def has_reported(folder: Path) -> bool:
    """Return whether a process of this machine has printed an error, for the launcher."""
    return any(folder.glob(f"{_REPORTED}*"))


def claim(folder: Path) -> bool:
    """Return True if no process has printed an error; the launcher then prints it and the ranks print nothing."""
    if has_reported(folder):
        return False
    (folder / f"{_REPORTED}first").touch()
    return True


def _record_loss(error: BaseException) -> bool:
    """Write a note about a loss for our launcher. Return False if our launcher did not start this process."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return False
    name = _LOST + os.environ.get("RANK", "0")
    note = {"at": time.time(), "reason": " ".join(str(error).split())[-200:]}
    try:
        unfinished = Path(folder, f".{name}")
        unfinished.write_text(json.dumps(note), encoding="utf-8")
        unfinished.replace(Path(folder, name))
    except OSError:
        return False
    return True


def _raised_in_communication(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and "torch/distributed/" in frames[-1].filename.replace(os.sep, "/")


def _wait_for_report(patience: float) -> bool:
    """Return True as soon as a process of this machine has printed an error; False if none has after `patience` seconds."""
    folder = _folder()
    deadline = time.monotonic() + patience
    while folder is not None:
        if has_reported(folder):
            return True
        if time.monotonic() >= deadline:
            break
        time.sleep(0.05)
    return False


def _folder() -> Path | None:
    """Return the folder that the processes of this machine share; None if no launcher made one."""
    ours, torchruns = os.environ.get(FOLDER), os.environ.get("TORCHELASTIC_ERROR_FILE")
    folder = Path(ours) if ours else Path(torchruns).parent.parent if torchruns else None
    return folder if folder is not None and folder.is_dir() else None


def _create(name: str) -> bool:
    """Create a file in the shared folder. Return False if it exists already, True also without a shared folder."""
    folder = _folder()
    if folder is None:
        return True
    try:
        (folder / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _touch(name: str) -> None:
    folder = _folder()
    if folder is not None:
        with contextlib.suppress(OSError):
            (folder / name).touch()


def _write_torchrun_error_file(line: str) -> None:
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None or _folder() is None or os.environ.get(FOLDER):
        return
    content = {"message": {"message": line, "extraInfo": {"timestamp": int(time.time())}}}
    with contextlib.suppress(OSError):
        Path(file).write_text(json.dumps(content), encoding="utf-8")

"""What a process says when a launcher started several of them: a mistake is said once a machine, by who met it first.

The processes of one machine share a folder, ours or the one torchrun makes, and with it agree on who speaks without asking anyone:
the process that creates a file there does. To torchrun the mistake is told in its own way too: it quotes a rank's error file as the
root cause at the end of its report. Knows nothing of torch.
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
"""Environment variable: the folder that our own launcher shares with the processes it started."""
MEETING = "MEGATRON_FT_MEETING"
"""Environment variable, in rank 0: the descriptor of a socket that the launcher has bound, to listen on."""
STACK_SIGNAL = signal.SIGUSR2
"""Makes a process that our launcher started write where it is, even one that waits outside Python."""

_SAID = "said-"
_LOST = "lost-"
_FAILING = "failing-"
_PATIENCE = 1.5  # seconds in which a process that failed first has said why, or our launcher has found it
_BROKEN = (
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
"""In what torch.distributed raises where another process is gone or does not answer."""


def say(line: str) -> None:
    """Print a user's mistake to standard error, unless a process of this machine has said the same."""
    _tell_torchrun(line)
    if _first(_SAID + hashlib.sha256(line.encode()).hexdigest()[:16]):
        print(line, file=sys.stderr, flush=True)


def speaks_first(error: BaseException) -> bool:
    """Return whether this process prints what went wrong: it is the first of this machine.

    Where another process's end or silence is all that went wrong, it leaves that to our launcher, which finds the cause, or, under
    another launcher, waits a while for the process that is the cause.
    """
    if is_loss(error):
        if _leave_to_launcher(error):
            return False
        if _somebody_speaks(_PATIENCE):
            return False
    return _first(_SAID + "first") if not _somebody_speaks(0) else False


def is_loss(error: BaseException) -> bool:
    """Return whether an error is what torch.distributed raises about another process that is gone or does not answer."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"DistError", "DistBackendError", "DistNetworkError", "DistStoreError"}:
        return True
    broken = any(words in str(error).lower() for words in _BROKEN)
    if isinstance(error, OSError):  # a file server, a web service: not another process of the run
        return broken and error.filename is None and _raised_in_communication(error)
    return broken and isinstance(error, RuntimeError)


def about_to_fail(error: BaseException) -> None:
    """Tell the launcher, before connections are taken down and others notice, that this process will say what is wrong."""
    if not is_loss(error):
        _note(_FAILING + os.environ.get("RANK", "0"))


def is_together() -> bool:
    """Return whether the processes of this machine have a folder to agree in."""
    return _folder() is not None


def be_seen() -> None:
    """In a process that our launcher started: write the stacks of all threads when STACK_SIGNAL comes."""
    folder = os.environ.get(FOLDER)
    if folder and os.path.isdir(folder):
        faulthandler.enable()
        file = open(stack_file(Path(folder), int(os.environ["RANK"])), "w")  # noqa: SIM115 - open as long as we live
        faulthandler.register(STACK_SIGNAL, file=file, all_threads=True)


def stack_file(folder: Path, rank: int) -> Path:
    return folder / f"stack-{rank}"


def ready(folder: Path, rank: int) -> bool:
    """Launcher's side: whether a rank answers STACK_SIGNAL; to another it would be the end."""
    return stack_file(folder, rank).exists()


@dataclass(frozen=True)
class Loss:
    """at: when a rank found another one gone or silent (s, Unix time). reason: the library's words."""

    at: float
    reason: str


def lost(folder: Path) -> dict[int, Loss]:
    """Launcher's side: ranks that have found another one gone or silent."""
    found = {}
    for path in folder.glob(f"{_LOST}*"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found[int(path.name.removeprefix(_LOST))] = Loss(**json.loads(path.read_text(encoding="utf-8")))
    return found


def failing(folder: Path) -> bool:
    """Launcher's side: whether a rank is about to say what is wrong."""
    return any(folder.glob(f"{_FAILING}*"))


def said(folder: Path) -> bool:
    """Launcher's side: whether a rank has said what is wrong."""
    return any(folder.glob(f"{_SAID}*"))


def claim(folder: Path) -> bool:
    """Launcher's side: whether nobody has spoken; from now on the launcher has."""
    if said(folder):
        return False
    (folder / f"{_SAID}first").touch()
    return True


def _leave_to_launcher(error: BaseException) -> bool:
    """Note a loss for our launcher; returns whether there is one."""
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


def _somebody_speaks(patience: float) -> bool:
    folder = _folder()
    deadline = time.monotonic() + patience
    while folder is not None:
        if any(folder.glob(f"{_SAID}*")):
            return True
        if time.monotonic() >= deadline:
            break
        time.sleep(0.05)
    return False


def _folder() -> Path | None:
    """The folder that is shared by the processes of this machine; None where there is no such launcher."""
    ours, torchruns = os.environ.get(FOLDER), os.environ.get("TORCHELASTIC_ERROR_FILE")
    folder = Path(ours) if ours else Path(torchruns).parent.parent if torchruns else None
    return folder if folder is not None and folder.is_dir() else None


def _first(name: str) -> bool:
    """Return whether no process has made this file before. Where they share nothing, each is the first."""
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


def _note(name: str) -> None:
    folder = _folder()
    if folder is not None:
        with contextlib.suppress(OSError):
            (folder / name).touch()


def _tell_torchrun(line: str) -> None:
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None or _folder() is None or os.environ.get(FOLDER):
        return
    content = {"message": {"message": line, "extraInfo": {"timestamp": int(time.time())}}}
    with contextlib.suppress(OSError):
        Path(file).write_text(json.dumps(content), encoding="utf-8")

"""The shared folder in which the first process of a rehearsal prepares the small run, and the check that all processes see it.

The first process writes a file, the others answer with one, and only then anything is prepared. So machines that do not share the
folder get an error early, instead of waiting for files that never appear. Without torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ft.errors import ConfigError
from megatron_ft.files import write_json

_HERE, _ANSWER, _READY = "here", "answer-", "ready.json"
_LOOK = 0.2  # seconds between two checks
AT_ONCE, BY_HAND = 75.0, 300.0
"""Time limits in seconds for another machine's first file: if srun starts all at once (NFS may cache its absence for 60 s), and if the
machines are started by hand one after another."""
MORE = 15.0  # additional seconds for the first process: the errors of the others are more precise
TO_PREPARE = 300.0  # seconds
GONE = 10.0  # seconds after which a missing folder counts as removed, not as replaced


def shared_place(places: dict[str, str]) -> tuple[str, Path]:
    """Return (flag, nearest existing parent) of the first folder that the run will write to, usually --save. The machines communicate
    there.

    places: flag -> folder. Raise ConfigError if it is not writable.
    """
    if not places:
        return "--save", Path(tempfile.gettempdir())
    flag, place = next(iter(places.items()))
    parent = next(folder for folder in Path(place).absolute().parents if os.path.isdir(folder))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(_refused(parent, "cannot be written to", flag))
    return flag, parent


@dataclass
class Meeting:
    """One process's part in the meeting. number: its index, 0 for the first. processes: their number."""

    folder: Path
    number: int
    processes: int
    first: str
    """Host name of the first process."""
    flag: str
    """Flag to change if the folder is not shared."""
    patience: float
    answer: str = field(init=False)

    def __post_init__(self) -> None:
        self.answer = f"{_ANSWER}{self.number}-{socket.gethostname()}-{secrets.token_hex(4)}"

    def begin(self) -> None:
        """Check that all processes see the folder. Raise ConfigError if they do not."""
        if self.number:
            self._until(lambda names: _HERE in names, self.patience, self._first_missing)
            self._touch(self.answer)
            return
        shutil.rmtree(self.folder, ignore_errors=True)  # left by a killed rehearsal
        try:
            self.folder.mkdir()
        except OSError as error:
            raise ConfigError(_refused(self.folder, (error.strerror or str(error)).lower(), self.flag)) from error
        self._touch(_HERE)
        self._until(
            lambda names: len(_answered(names)) + 1 >= self.processes, self.patience + MORE, self._others_missing
        )

    def open(self) -> None:
        """Announce that everything is prepared. Only the first process calls it."""
        write_json(self.folder / _READY, [name for name in _names(self.folder) if name.startswith(_ANSWER)])

    def wait(self) -> None:
        """Wait for that, in the other processes. Raise ConfigError if the first process has ended."""
        seen = time.monotonic()

        def is_ready(names: list[str]) -> bool:
            nonlocal seen
            if _HERE in names:
                seen = time.monotonic()
                if self.answer not in names:  # the folder was replaced
                    self._touch(self.answer)
            elif time.monotonic() - seen > GONE:
                raise ConfigError(f"{self.first} ended the rehearsal before it began; its output shows the cause")
            return _READY in names and self._is_for_us()

        def late() -> str:
            return f"{self.folder}: {self.first} did not prepare it within {TO_PREPARE:.0f} s"

        self._until(is_ready, TO_PREPARE, late)

    def end(self) -> None:
        """Remove the folder. Only the first process calls it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _is_for_us(self) -> bool:
        """Return False for a file of an earlier rehearsal."""
        try:
            return self.answer in json.loads((self.folder / _READY).read_text())
        except (OSError, ValueError):
            return False

    def _until(self, seen: Callable[[list[str]], bool], patience: float, late: Callable[[], str]) -> None:
        deadline = time.monotonic() + patience
        while not seen(_names(self.folder)):
            if time.monotonic() > deadline:
                raise ConfigError(late())
            time.sleep(_LOOK)

    def _touch(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # it is being removed
            (self.folder / name).touch()

    def _first_missing(self) -> str:
        return (
            f"{self.folder}: {socket.gethostname()} sees no file that {self.first} writes, after {self.patience:.0f} s; "
            + self._remedy()
        )

    def _others_missing(self) -> str:
        answered = _answered(_names(self.folder))
        missing = [str(number) for number in range(1, self.processes) if number not in answered]
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        hosts = os.environ.get("SLURM_STEP_NODELIST", "the other machines")
        return (
            f"{self.folder}: {socket.gethostname()} got no answer, after {self.patience + MORE:.0f} s, from number "
            f"{', '.join(missing[:8])}{more} of {self.processes} on {hosts}; {self._remedy()}"
        )

    def _remedy(self) -> str:
        return f"the machines do not share this folder, or one was not started: set {self.flag} to a folder that all machines see"


def _refused(place: Path, reason: str, flag: str) -> str:
    return (
        f"{place}: {reason}; the processes of a rehearsal share a folder beside {flag}: set {flag} to a folder that does not exist yet, "
        f"in one that is writable"
    )


def _names(folder: Path) -> list[str]:
    """Return the names in a folder. The parent is read first, so that a network file system updates a cached absence."""
    try:
        with os.scandir(folder.parent) as entries:
            next(entries, None)
        return os.listdir(folder)
    except OSError:
        return []


def _answered(names: list[str]) -> set[int]:
    return {int(name.removeprefix(_ANSWER).split("-")[0]) for name in names if name.startswith(_ANSWER)}

"""A folder in which the processes of a rehearsal find what the first of them prepares, and how they make sure that they all see it.

The first says that it is there, the others answer, and only then is anything prepared: machines that do not share the folder are
told at once, not by a wait for what can never appear. No torch.
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
_LOOK = 0.2  # seconds between two looks
AT_ONCE, BY_HAND = 75.0, 300.0
"""Seconds in which another machine's first file is seen: where srun starts all (NFS may remember for 60 s that there was none), and
where somebody starts one after the other."""
MORE = 15.0  # seconds that the first waits longer than the others, who know more
TO_PREPARE = 300.0  # seconds
GONE = 10.0  # seconds after which a folder that has vanished was not only made anew


def shared_place(places: dict[str, str]) -> tuple[str, Path]:
    """Where several machines meet: beside the first folder that they will write to, --save above all, as the run's flag and the nearest
    parent that is there. places: flag -> folder. Raises ConfigError where nothing can be written there."""
    if not places:
        return "--save", Path(tempfile.gettempdir())
    flag, place = next(iter(places.items()))
    parent = next(folder for folder in Path(place).absolute().parents if os.path.isdir(folder))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(_refused(parent, "cannot be written to", flag))
    return flag, parent


@dataclass
class Meeting:
    """One process's part in it. number: its own, 0 for the first; processes: how many there are."""

    folder: Path
    number: int
    processes: int
    first: str
    """Name of the first one's machine."""
    flag: str
    """What to set where the folder is not shared."""
    patience: float
    answer: str = field(init=False)

    def __post_init__(self) -> None:
        self.answer = f"{_ANSWER}{self.number}-{socket.gethostname()}-{secrets.token_hex(4)}"

    def begin(self) -> None:
        """Meet. Raises ConfigError where the others are not seen."""
        if self.number:
            self._until(lambda names: _HERE in names, self.patience, self._nobody)
            self._touch(self.answer)
            return
        shutil.rmtree(self.folder, ignore_errors=True)  # of one that was killed
        try:
            self.folder.mkdir()
        except OSError as error:
            raise ConfigError(_refused(self.folder, (error.strerror or str(error)).lower(), self.flag)) from error
        self._touch(_HERE)
        self._until(lambda names: len(_answered(names)) + 1 >= self.processes, self.patience + MORE, self._unanswered)

    def open(self) -> None:
        """The first: what the others wait for is there."""
        write_json(self.folder / _READY, [name for name in _names(self.folder) if name.startswith(_ANSWER)])

    def wait(self) -> None:
        """The others: until it is. Raises ConfigError where the first has ended."""
        seen = time.monotonic()

        def is_ready(names: list[str]) -> bool:
            nonlocal seen
            if _HERE in names:
                seen = time.monotonic()
                if self.answer not in names:  # of a folder that was made anew
                    self._touch(self.answer)
            elif time.monotonic() - seen > GONE:
                raise ConfigError(f"{self.first} has ended the rehearsal before it began; what it said is the cause")
            return _READY in names and self._is_for_us()

        def late() -> str:
            return f"{self.folder}: {self.first} did not prepare it within {TO_PREPARE:.0f} s"

        self._until(is_ready, TO_PREPARE, late)

    def end(self) -> None:
        """The first: remove it all."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _is_for_us(self) -> bool:
        """Not what an earlier rehearsal has left behind."""
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
        with contextlib.suppress(FileNotFoundError):  # it is removed at this moment
            (self.folder / name).touch()

    def _nobody(self) -> str:
        return (
            f"{self.folder}: {socket.gethostname()} sees nothing there of what {self.first} writes, after {self.patience:.0f} s; "
            + self._remedy()
        )

    def _unanswered(self) -> str:
        answered = _answered(_names(self.folder))
        missing = [str(number) for number in range(1, self.processes) if number not in answered]
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        hosts = os.environ.get("SLURM_STEP_NODELIST", "the other machines")
        return (
            f"{self.folder}: {socket.gethostname()} is not answered there, after {self.patience + MORE:.0f} s, by number "
            f"{', '.join(missing[:8])}{more} of {self.processes} on {hosts}; {self._remedy()}"
        )

    def _remedy(self) -> str:
        return (
            f"they do not share that folder, or one was not started: set {self.flag} to a folder that all machines see"
        )


def _refused(place: Path, reason: str, flag: str) -> str:
    return (
        f"{place}: {reason}; what the processes of a rehearsal share goes beside {flag}: give {flag} a folder that is not there yet, "
        f"in one that you can write to"
    )


def _names(folder: Path) -> list[str]:
    """What lies there. The parent is read first: a network file system then asks anew for a folder that it took for missing."""
    try:
        with os.scandir(folder.parent) as entries:
            next(entries, None)
        return os.listdir(folder)
    except OSError:
        return []


def _answered(names: list[str]) -> set[int]:
    return {int(name.removeprefix(_ANSWER).split("-")[0]) for name in names if name.startswith(_ANSWER)}

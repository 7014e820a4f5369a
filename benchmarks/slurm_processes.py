"""Processes of this machine, as /proc tells of them: what has been started, what it started, and whose it is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """One that was started, known by when: its number may be another's later."""

    pid: int
    began: str

    @classmethod
    def of(cls, pid: int) -> Process | None:
        fields = _stat(pid)
        return cls(pid, fields[19]) if fields else None

    def alive(self) -> bool:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)  # ours are not to stay as zombies
        fields = _stat(self.pid)
        return bool(fields) and fields[19] == self.began and fields[0] != "Z"

    def send(self, number: int) -> None:
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat from the state on; empty: no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def children(pid: int) -> list[int]:
    return [other for other in _pids() if (fields := _stat(other)) and fields[1] == str(pid)]


def command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def environment(pid: int) -> dict[str, str]:
    """What a process was started with; empty where it is gone, or not ours to look at."""
    with contextlib.suppress(OSError):
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        return dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    return {}


def environments() -> Iterator[tuple[int, dict[str, str]]]:
    """(number, environment) of all processes."""
    return ((pid, environment(pid)) for pid in _pids())

"""Results of checks. Plain data, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["pass", "fail", "skipped"]


@dataclass(frozen=True)
class Found:
    """The return value of a check's function."""

    outcome: Outcome
    detail: str
    """One line: the measurement, the problem and how to fix it, or the reason why the check was skipped."""


def passed(detail: str) -> Found:
    return Found("pass", detail)


def failed(detail: str) -> Found:
    return Found("fail", detail)


def skipped(reason: str) -> Found:
    return Found("skipped", reason)


@dataclass(frozen=True)
class Result:
    """One line of the report."""

    name: str
    outcome: Outcome
    detail: str
    seconds: float
    log: str = ""
    """For a failed check: the end of its output."""

    def line(self, width: int) -> str:
        """Return the line as text. width: of the column of names."""
        return f"  {self.outcome:8} {self.name:{width}} {self.seconds:5.1f} s  {self.detail}"


@dataclass(frozen=True)
class Ended:
    """A command that has ended. code is None if it was killed at the time limit."""

    code: int | None
    out: str
    err: str

    @property
    def reason(self) -> str:
        """Return the reason of a failure in one line: the command's error message, else the last line of its output."""
        if self.code is None:
            return "it hangs"
        lines = [line.strip() for line in (self.err or self.out).splitlines() if line.strip()]
        errors = [line for line in lines if ": error: " in line]
        traced = [lines[-1]] if errors and errors[0].endswith(":") and lines[-1] != errors[0] else []
        return " ".join([*(errors[:1] or lines[-1:]), *traced]) or "it printed nothing"

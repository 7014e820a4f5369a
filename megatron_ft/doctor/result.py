"""What a check found. Plain data, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["pass", "fail", "skipped"]


@dataclass(frozen=True)
class Found:
    """What a check's function returns."""

    outcome: Outcome
    detail: str
    """One line: what was measured, what is wrong and how to put it right, or why it was not tried."""


def passed(detail: str) -> Found:
    return Found("pass", detail)


def failed(detail: str) -> Found:
    return Found("fail", detail)


def skipped(reason: str) -> Found:
    return Found("skipped", reason)


@dataclass(frozen=True)
class Result:
    """A line of the report."""

    name: str
    outcome: Outcome
    detail: str
    seconds: float
    log: str = ""
    """Where it failed: the end of what the check's processes printed."""

    def line(self, width: int) -> str:
        """width: of the name's column."""
        return f"  {self.outcome:8} {self.name:{width}} {self.seconds:5.1f} s  {self.detail}"


@dataclass(frozen=True)
class Ended:
    """A command that has ended, or was ended: code is None where it hung."""

    code: int | None
    out: str
    err: str

    @property
    def said(self) -> str:
        """Why it failed, in one line: what the command itself says, else its last words."""
        if self.code is None:
            return "it hangs"
        lines = [line.strip() for line in (self.err or self.out).splitlines() if line.strip()]
        errors = [line for line in lines if ": error: " in line]
        traced = [lines[-1]] if errors and errors[0].endswith(":") and lines[-1] != errors[0] else []
        return " ".join([*(errors[:1] or lines[-1:]), *traced]) or "it said nothing"

"""What is counted while the pretended GPU computes: host waits, operations, collectives, destroyed groups."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from types import FrameType

_SOURCES = ("megatron_ft/", "megatron/core/", "checkpoints_conversion/")
_DEEPEST = 3
"""Frames of megatron-core that are named before the search for one of ours is given up."""


@dataclass
class Counts:
    """Of one stretch of a program."""

    waits: Counter = field(default_factory=Counter)
    """(what the host waited for, where, whether in a transformer layer) -> times"""
    operations: Counter = field(default_factory=Counter)
    """operation -> times it was started: what a GPU would get as launches, roughly"""
    collectives: Counter = field(default_factory=Counter)
    """(collective, where) -> times"""

    def total(self, in_layer: bool | None = None) -> int:
        """Return the number of host waits; of those inside (or outside) transformer layers."""
        return sum(n for (*_, layer), n in self.waits.items() if in_layer is None or layer == in_layer)

    def table(self) -> str:
        """Return the waits by file and line, most frequent first."""
        lines = [
            f"{times:6}  {'in a layer' if layer else '':10}  {what:34} {where}"
            for (what, where, layer), times in self.waits.most_common()
        ]
        summary = (
            f"{self.total()} host waits ({self.total(True)} in a layer), {sum(self.operations.values())} operations"
        )
        return "\n".join([summary, *lines])


COUNTS = Counts()
"""Of this process, since the last `restart`."""


def restart() -> None:
    """Forget what was counted."""
    for counter in (COUNTS.waits, COUNTS.operations, COUNTS.collectives):
        counter.clear()


def counted() -> Counts:
    """Return a copy of what was counted since `restart`."""
    return Counts(Counter(COUNTS.waits), Counter(COUNTS.operations), Counter(COUNTS.collectives))


def note_wait(what: str) -> None:
    """Count one wait of the host for the device, by the line that asks for it."""
    where, in_layer = place()
    COUNTS.waits[what, where, in_layer] += 1


def place() -> tuple[str, bool]:
    """Return the innermost lines of the engine down to the first of ours, and whether a transformer layer is on the stack."""
    found: list[str] = []
    ours, in_layer = False, False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        in_layer = in_layer or name.endswith("transformer/transformer_layer.py")
        source = next((source for source in _SOURCES if source in name), None)
        if source and not ours and len(found) < _DEEPEST:
            folder = source.rstrip("/").replace("megatron/core", "mcore")
            found.append(f"{folder}/{name.rpartition(source)[2]}:{frame.f_lineno}")
            ours = source != "megatron/core/"
        frame = frame.f_back
    return " < ".join(found) or "elsewhere", in_layer

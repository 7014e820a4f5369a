"""Counts and sizes as people write them: "1 row", "2 rows", "176 kB"."""

from __future__ import annotations

import re

_UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "bytes"))


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, in the plural unless it is one: "1 process", "2 processes", "1,000 entries"."""
    return f"{count:,} {noun if count == 1 else plural(noun)}"


def every(interval: int, noun: str) -> str:
    """Return "every step", "every 10 steps"."""
    return f"every {noun if interval == 1 else counted(interval, noun)}"


def plural(noun: str) -> str:
    """Return the regular plural of the last word of a noun."""
    if re.search(r"[^aeiou]y$", noun):
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith(("s", "x", "ch", "sh")) else f"{noun}s"


def human(count: int) -> str:
    """Return 3400000 as "3.4 M"."""
    for unit, name in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if count >= unit:
            return f"{count / unit:.1f}{name}"
    return str(count)


def size(count: float, digits: int = 1) -> str:
    """Return bytes in the largest unit of which there is one: "13.5 GB", "176.0 kB", "12 bytes"."""
    scale, unit = _unit(count)
    return f"{count / scale:,.{digits}f} {unit}" if scale > 1 else counted(round(count), "byte")


def part_of(done: float, total: float) -> str:
    """Return both in the unit of the total: "3.2 of 13.5 GB"."""
    scale, unit = _unit(total)
    digits = 1 if scale > 1 else 0
    return f"{done / scale:,.{digits}f} of {total / scale:,.{digits}f} {unit}"


def _unit(count: float) -> tuple[int, str]:
    return next(((scale, unit) for scale, unit in _UNITS if count >= scale), _UNITS[-1])

"""Times a function: what a GPU has queued is waited for, and the median of several calls counts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from megatron_ft import device

_CALLS, _LONGEST = 20, 1.0  # at most so many calls, for about so many seconds


def seconds_of(call: Callable[[], object]) -> float:
    """Return how long one call takes."""
    device.synchronize()
    start = time.perf_counter()
    call()
    device.synchronize()
    return time.perf_counter() - start


def median_ms(call: Callable[[], object]) -> float:
    """Return the median of several calls in milliseconds. The first one, which may compile or allocate, does not count."""
    call()
    times = [seconds_of(call)]
    while len(times) < _CALLS and sum(times) < _LONGEST:
        times.append(seconds_of(call))
    return 1000 * statistics.median(times)

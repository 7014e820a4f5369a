"""The peak memory of this process: allocated by torch on the GPU, or resident (VmHWM) on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from pathlib import Path

from megatron_ft import device

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESTART = "5"
"""Written to clear_refs, this makes Linux count VmHWM anew (proc_pid_clear_refs, section 5)."""


def peak_bytes() -> int:
    """Return the largest memory since the process began or `restart_peak` was called.

    On a CPU not getrusage's maximum: a process inherits that from the one which started it.
    """
    if device.has_gpu() or not _STATUS.exists():
        return device.peak_memory_bytes()
    found = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else device.peak_memory_bytes()


def restart_peak() -> bool:
    """Give freed memory back and count the peak anew. Return False where the system cannot: the peak then includes what was before."""
    gc.collect()
    if device.has_gpu():
        device.empty_cache()
        return True
    with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text(_RESTART)
    except OSError:
        return False
    return True

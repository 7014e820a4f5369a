"""Compiles kernel.c once and keeps the library in the user's cache folder, under a name that contains a hash of all it depends on.

Where there is no compiler, or where the library does not compute what reference.py does, that takes its place.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

from megatron_ft.files import temporary_name
from megatron_ft.log import logger

log = logger("sparse")

SOURCE = Path(__file__).with_name("kernel.c")
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-ffp-contract=off", "-fPIC", "-shared", "-pthread")
_PLAIN_CPU = tuple(flag for flag in FLAGS if flag != "-march=native")
LONGEST = 120  # seconds that a compiler may take


class NotBuilt(Exception):
    """Why there is no library."""


@functools.cache
def library() -> ctypes.PyDLL | None:
    """Return the compiled kernel, or None with a warning in the log that says why."""
    try:
        return open_library(cache_folder(), find_compiler())
    except NotBuilt as error:
        log.warning(f"sparse decoding computes with torch, which is slower: {error}")
        return None


def find_compiler() -> str:
    """Return the path of the C compiler: that of $CC, else the system's. Raise NotBuilt if there is none."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise NotBuilt(f"there is no C compiler ({', '.join(names)}); install gcc, or name one in $CC")
    return found


def cache_folder() -> Path:
    """Return the folder of compiled kernels: below $XDG_CACHE_HOME, else ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base, "megatron_ft", "kernels")


def open_library(folder: Path, compiler: str) -> ctypes.PyDLL:
    """Return the library of this source, compiler and CPU in `folder`, after compiling it if it is not there. Raise NotBuilt."""
    path = folder / f"sparse-{_hash(compiler)}.so"
    try:
        if not path.exists():
            _compile(compiler, path)
        return ctypes.PyDLL(str(path))  # it keeps the interpreter's lock, so that one thread at a time gives it work
    except (OSError, subprocess.SubprocessError) as error:
        raise NotBuilt(f"{compiler}: {_said(error)}") from error


def _compile(compiler: str, path: Path) -> None:
    """Write the library under a temporary name and rename it, so that another process sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = temporary_name(path)
    try:
        done = _call(compiler, FLAGS, unfinished)
        if done.returncode:  # a compiler that does not know this CPU, or -march=native
            done = _call(compiler, _PLAIN_CPU, unfinished)
        done.check_returncode()
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _call(compiler: str, flags: tuple[str, ...], output: Path) -> subprocess.CompletedProcess:
    command = [compiler, *flags, "-o", str(output), str(SOURCE)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LONGEST)


def _hash(compiler: str) -> str:
    """Return a hash of the source, the flags, the compiler and the CPU: a home folder may be shared by different machines."""
    told = hashlib.sha256()
    for part in (SOURCE.read_bytes(), " ".join(FLAGS).encode(), _identity(compiler).encode(), _cpu().encode()):
        told.update(hashlib.sha256(part).digest())
    return told.hexdigest()[:24]


def _identity(compiler: str) -> str:
    """Return what changes with the compiler, without starting it."""
    place = Path(compiler).resolve()
    there = place.stat()
    return f"{place} {there.st_size} {there.st_mtime_ns}"


def _cpu() -> str:
    """Return the CPU's features where the system lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()} {features}"


def _said(error: Exception) -> str:
    """Return the first line of what a compiler or the system says."""
    words = getattr(error, "stderr", None) or str(error)
    return str(words).strip().splitlines()[0][:160] if str(words).strip() else type(error).__name__

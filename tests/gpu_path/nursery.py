"""One process that pretends a GPU and has imported the engine; ranks are forked from it, as tests/ranks.py does for the CPU.

    python -m tests.gpu_path.nursery DESCRIPTOR FOLDER...

It cannot be the tests' own process: torch that pretends a GPU does so for good. FOLDERs are put before everything that is imported
(packages that a GPU machine has, see stubs). The other side is `Nursery`, and `GpuRanks` looks like tests.ranks.Ranks.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import multiprocessing.connection
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.ranks import RankFailed

ROOT = Path(__file__).resolve().parents[2]
STUBS = Path(__file__).parent / "stubs"
STARTING = 240.0
"""Seconds for imports on a busy machine."""
LATER = 30.0
"""Seconds beyond a job's own deadline until the nursery itself is given up."""


class Nursery:
    """The process, as the tests see it. packages: folders of stubs that it imports."""

    def __init__(self, *packages: str):
        ours, theirs = multiprocessing.Pipe()
        folders = [str(STUBS / name) for name in packages]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        environment.pop("MEGATRON_FT_DEVICE", None)
        command = [sys.executable, "-m", "tests.gpu_path.nursery", str(theirs.fileno()), *folders]
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()
        self._pipe = ours
        self.ask("ready", timeout=STARTING)

    def ask(self, *request: Any, timeout: float) -> Any:
        """Return the nursery's answer. Raise RankFailed with its traceback, or where it gives none in time."""
        try:
            if request[0] != "ready":
                self._pipe.send_bytes(pickle.dumps(request))
            if not self._pipe.poll(timeout):
                raise RankFailed(f"the nursery did not answer within {timeout:.0f} s")
            answered, value = self._pipe.recv()
        except (EOFError, BrokenPipeError, RankFailed) as error:
            self.close()
            raise RankFailed(str(error) or "the nursery died") from None
        if not answered:
            raise RankFailed(value)
        return value

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        if self.alive:
            self._process.kill()
        self._process.wait(10)
        self._pipe.close()


class GpuRanks:
    """`size` processes on pretended GPUs. run(function, ...) as in tests.ranks.Ranks; after a failure they are forked anew."""

    def __init__(self, nursery: Nursery, size: int):
        self.nursery, self.size = nursery, size

    def run(self, function: Callable, *args: Any, timeout: float = 120.0) -> list:
        """Return what each rank returned, by rank."""
        return self.nursery.ask("run", self.size, function, args, timeout, timeout=timeout + LATER)

    def close(self) -> None:
        """End the processes."""
        if self.nursery.alive:
            self.nursery.ask("close", self.size, timeout=LATER)


def main(descriptor: int, folders: list[str]) -> None:
    """Serve one Nursery until it is gone."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the tests
    sys.path[:0] = folders
    from tests.gpu_path import pretended

    pretended.install()
    from megatron_ft.engine.start import prepare_engine

    prepare_engine()
    from megatron_ft.models import machine

    machine.try_compile = lambda: (
        None
    )  # where there is a GPU, there are Triton and a C compiler; here they may be missing
    for name in ("steps", "runs"):  # what ranks are asked for, imported once
        importlib.import_module(f"tests.gpu_path.{name}")
    pipe, pools = Connection(descriptor), {}
    pipe.send((True, None))
    with contextlib.suppress(EOFError):
        while True:
            request = pickle.loads(pipe.recv_bytes())
            try:
                pipe.send((True, _answer(pools, *request)))
            except BaseException as error:
                pipe.send((False, str(error) if isinstance(error, RankFailed) else traceback.format_exc()))


def _answer(
    pools: dict, what: str, size: int, function: Callable | None = None, args: tuple = (), timeout: float = 0.0
):
    from tests.ranks import Ranks

    if what == "close":
        return pools.pop(size).close() if size in pools else None
    pools[size] = pools.get(size) or Ranks(size)
    try:
        return pools[size].run(function, *args, timeout=timeout)
    except RankFailed:
        del pools[size]  # it has closed itself
        raise


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
    os._exit(0)

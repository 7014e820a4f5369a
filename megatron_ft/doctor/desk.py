"""Gives checks to a worker one after another, with a deadline each; whatever becomes of the worker, there is a result."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_ft.doctor.checks import CHECKS, Check
from megatron_ft.doctor.result import Found, Result, failed
from megatron_ft.doctor.worker import answer_file, died
from megatron_ft.files import read_json

_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_RANK", "MASTER_", "SLURM_", "TORCHELASTIC", "MEGATRON_FT_RANKS")
"""Beginnings of environment variables by which a process knows itself as one of several. A check starts its own."""
_SHOWN = 4000
"""Characters of a failed check's output that are kept, the last ones."""


@contextlib.contextmanager
def desk() -> Iterator[Desk]:
    """A desk over a temporary folder; at the end nothing of either is left."""
    with tempfile.TemporaryDirectory(prefix="megatron-ft-doctor-", ignore_cleanup_errors=True) as name:
        one = Desk(Path(name))
        try:
            yield one
        finally:
            one.close()


class Desk:
    """Starts the worker when there is something to do."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.log = folder / "log"
        self.log.touch()
        self.worker: subprocess.Popen | None = None

    def results(self, checks: Sequence[Check] = CHECKS) -> Iterator[Result]:
        """Run checks, in order, each as soon as it is asked for."""
        for check in checks:
            began, seen = time.monotonic(), self.log.stat().st_size
            found = self._ask(check)
            log = ""
            if found.outcome == "fail":
                self.close()
                log = self.log.read_bytes()[seen:].decode(errors="replace")[-_SHOWN:]
            yield Result(check.name, found.outcome, found.detail, time.monotonic() - began, log)

    def _ask(self, check: Check) -> Found:
        worker = self.worker = self.worker or self._start()
        answer, deadline = answer_file(self.folder, check), time.monotonic() + check.seconds
        assert worker.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.write(f"{check.function}\n")
            worker.stdin.flush()
        while time.monotonic() < deadline:
            ended = worker.poll()  # before looking: what it wrote last is there by now
            if answer.exists():
                return Found(**read_json(answer))
            if ended is not None:
                return died(ended) or failed("the process ended without an answer")
            time.sleep(0.05)
        return failed(f"it hangs: no answer within {check.seconds:.0f} s")

    def _start(self) -> subprocess.Popen:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHED)}
        places = {name: str(self.folder / "tmp") for name in ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        (self.folder / "tmp").mkdir(exist_ok=True)
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "megatron_ft.doctor.worker", "--folder", str(self.folder)],
                stdin=subprocess.PIPE, stdout=log, stderr=log, text=True, start_new_session=True,
                env={"OMP_NUM_THREADS": "1", **kept, **places},
            )  # fmt: skip

    def close(self) -> None:
        """End the worker and all that it has started."""
        if self.worker is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.worker.pid, signal.SIGKILL)
        if self.worker.stdin is not None:
            self.worker.stdin.close()
        self.worker.wait()
        self.worker = None

"""Runs the checks one after another in a worker process, each with a time limit. A crash of the worker is a failed check."""

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
from megatron_ft.doctor.worker import exit_failure, result_file
from megatron_ft.files import read_json

_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_RANK", "MASTER_", "SLURM_", "TORCHELASTIC", "MEGATRON_FT_RANKS")
"""Prefixes of the environment variables of launchers. Checks run without them, because they start their own processes."""
_SHOWN = 4000
"""Number of last characters of a failed check's output that go to the report."""


@contextlib.contextmanager
def check_runner() -> Iterator[CheckRunner]:
    """Provide a runner with a temporary folder; at the end its processes and the folder are removed."""
    with tempfile.TemporaryDirectory(prefix="megatron-ft-doctor-", ignore_cleanup_errors=True) as name:
        runner = CheckRunner(Path(name))
        try:
            yield runner
        finally:
            runner.close()


class CheckRunner:
    """Runs checks in a worker process, which starts with the first check."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.log = folder / "log"
        self.log.touch()
        self.worker: subprocess.Popen | None = None

    def results(self, checks: Sequence[Check] = CHECKS) -> Iterator[Result]:
        """Run the checks in order; each runs when its result is requested."""
        for check in checks:
            began, seen = time.monotonic(), self.log.stat().st_size
            found = self._run(check)
            log = ""
            if found.outcome == "fail":
                self.close()
                log = self.log.read_bytes()[seen:].decode(errors="replace")[-_SHOWN:]
            yield Result(check.name, found.outcome, found.detail, time.monotonic() - began, log)

    def _run(self, check: Check) -> Found:
        worker = self.worker = self.worker or self._start()
        result, deadline = result_file(self.folder, check), time.monotonic() + check.seconds
        assert worker.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.write(f"{check.function}\n")
            worker.stdin.flush()
        while time.monotonic() < deadline:
            ended = worker.poll()  # before the file is read: a worker that has ended has written everything
            if result.exists():
                return Found(**read_json(result))
            if ended is not None:
                return exit_failure(ended) or failed("the process ended without a result")
            time.sleep(0.05)
        return failed(f"it hangs: no result within {check.seconds:.0f} s")

    def _start(self) -> subprocess.Popen:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHED)}
        places = {name: str(self.folder / "tmp") for name in ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        (self.folder / "tmp").mkdir(exist_ok=True)
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "megatron_ft.doctor.worker", "--folder", str(self.folder)],
                stdin=subprocess.PIPE, stdout=log, stderr=log, text=True, start_new_session=True,
                env={"OMP_NUM_THREADS": "1", **environment, **places},
            )  # fmt: skip

    def close(self) -> None:
        """Kill the worker and all processes that it has started."""
        if self.worker is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.worker.pid, signal.SIGKILL)
        if self.worker.stdin is not None:
            self.worker.stdin.close()
        self.worker.wait()
        self.worker = None

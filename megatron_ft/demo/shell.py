"""Runs commands as a user would type them, each in its own process, with all output in one log file."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_ft.device import CPU

_AS_TYPED = {
    "megatron-ft": ("-m", "megatron_ft"),
    "python": (),
}
# Threads do not speed up tiny matrices, and the threads of four processes would compete for few cores. The demo is the same on
# every machine, so it does not use a GPU.
ENVIRONMENT = {**CPU, "TOKENIZERS_PARALLELISM": "false"}
_POLL = 0.2  # seconds
_SHOWN = 12  # last lines of a failed command's output


class CommandFailed(Exception):
    """A command ended with an error. The text: the command, the reason, its last lines of output."""


class Shell:
    """Runs commands. log: file that all output is appended to. All processes end with their run()."""

    def __init__(self, log: Path):
        self.log = log

    def run(self, words: Sequence[str], watch: Callable[[], None] | None = None) -> str:
        """Run a command (its first word is megatron-ft or python) and return its output.

        watch: called a few times per second while it runs. Raise CommandFailed if it ends with an error.
        """
        with self.log.open("ab") as log:
            log.write(f"\n$ {shlex.join(words)}\n".encode())
            log.flush()
            start = log.tell()
            process = subprocess.Popen(
                [sys.executable, *_AS_TYPED[words[0]], *words[1:]],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT}, start_new_session=True,
            )  # fmt: skip
            try:
                while process.poll() is None:
                    if watch:
                        watch()
                    time.sleep(_POLL)
            finally:
                _end(process)
        output = self._output(start)
        if process.returncode:
            raise CommandFailed(_explain(words, process.returncode, output, self.log))
        return output

    def _output(self, start: int) -> str:
        with self.log.open("rb") as log:
            log.seek(start)
            return log.read().decode(errors="replace")


def _end(process: subprocess.Popen) -> None:
    """Stop a command that is still running. SIGTERM comes first: it lets a launcher stop the processes that it started."""
    if process.poll() is not None:
        return
    for kind, patience in ((signal.SIGTERM, 40), (signal.SIGKILL, 10)):  # a run saves first
        try:
            os.killpg(process.pid, kind)
            process.wait(patience)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _explain(words: Sequence[str], code: int, output: str, log: Path) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if ": error: " in line]
    what = f"ended with exit code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
    if -code == signal.SIGKILL or "SIGKILL" in output:
        what += " (often because the machine's memory is full)"
    tail = "\n".join(f"  | {line[:200]}" for line in (errors or lines)[-_SHOWN:])
    return f"$ {shlex.join(words)}\n  {what}; the complete output is in {log}, its last lines are:\n{tail}"

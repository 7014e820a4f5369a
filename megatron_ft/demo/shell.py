"""Runs commands as a user would type them, in processes of their own, with everything they say in one log file."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_AS_TYPED = {
    "megatron-ft": ("-m", "megatron_ft"),
    "python": (),
}
# Tiny matrices gain nothing from threads, and four processes' threads would fight for few cores. The demo is the same
# on every machine, so a GPU stays unused.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MEGATRON_FT_DEVICE": "cpu", "TOKENIZERS_PARALLELISM": "false"}
_POLL = 0.2  # seconds
_SHOWN = 12  # last lines of a failed command's output


class CommandFailed(Exception):
    """A command ended with an error. The text: the command, what its end means, its last lines."""


class Shell:
    """log: file that all output is appended to. Nothing it starts outlives a run()."""

    def __init__(self, log: Path):
        self.log = log

    def run(self, words: Sequence[str], watch: Callable[[], None] | None = None) -> str:
        """Run a command (its first word is megatron-ft or python) and return what it printed.

        watch: called a few times a second meanwhile. Raises CommandFailed.
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
    """Stop a command that still runs; a launcher, asked politely, stops the processes that it started."""
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
    said = [line for line in lines if ": error: " in line]
    what = f"ended with exit code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
    if -code == signal.SIGKILL or "SIGKILL" in output:
        what += " (often the machine's way to say that its memory is full)"
    tail = "\n".join(f"  | {line[:200]}" for line in (said or lines)[-_SHOWN:])
    return f"$ {shlex.join(words)}\n  {what}; its last lines, all of them are in {log}:\n{tail}"

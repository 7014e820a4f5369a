"""Runs commands as a user would type them, each in its own process, with all output in one log file."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_ft.device import CPU
from megatron_ft.errors import UserError

_AS_TYPED = {
    "megatron-ft": ("-m", "megatron_ft"),
    "python": (),
}
ON_CPU = {**CPU, "TOKENIZERS_PARALLELISM": "false"}
"""Threads do not speed up tiny matrices, and the threads of four processes would compete for few cores."""
_POLL = 0.2  # seconds
_SHOWN = 12  # last lines of a failed command's output


class CommandFailed(Exception):
    """A command ended with an error. The text: the command, the reason, its last lines of output.

    code: its exit code. mistake: what it says is the user's mistake, in one line; None: it says nothing of the kind.
    """

    def __init__(self, text: str, code: int, mistake: str | None):
        super().__init__(text)
        self.code, self.mistake = code, mistake


class Shell:
    """Runs commands. log: file that all output is appended to. environment: more variables. All processes end with their run()."""

    def __init__(self, log: Path, environment: Mapping[str, str]):
        self.log, self.environment = log, environment

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
                env={**os.environ, **self.environment}, start_new_session=True,
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
            raise CommandFailed(
                _explain(words, process.returncode, output, self.log),
                process.returncode,
                _mistake(process.returncode, output),
            )
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


def _mistake(code: int, output: str) -> str | None:
    """Return the line in which a command with exit code 2 says what is wrong, without its own name."""
    found = [line.partition(": error: ")[2] for line in output.splitlines() if ": error: " in line]
    return found[-1] if code == UserError.exit_code and found else None


def _explain(words: Sequence[str], code: int, output: str, log: Path) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if ": error: " in line]
    what = f"ended with exit code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
    if -code == signal.SIGKILL or "SIGKILL" in output:
        what += " (often because the machine's memory is full)"
    tail = "\n".join(f"  | {line[:200]}" for line in (errors or lines)[-_SHOWN:])
    return f"$ {shlex.join(words)}\n  {what}; the complete output is in {log}, its last lines are:\n{tail}"

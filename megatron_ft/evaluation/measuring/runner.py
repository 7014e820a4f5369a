"""Starts the process of each configuration and reads what it measured."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from megatron_ft.errors import ConfigError
from megatron_ft.evaluation.measuring.job import KILLED, Job, Measured
from megatron_ft.files import read_json, write_json


def measure_in_process(job: Job) -> Measured:
    """Return what a new process measured. Raise ConfigError with the message of a user's mistake that it found."""
    with tempfile.TemporaryDirectory() as folder:
        asked, told = Path(folder, "job.json"), Path(folder, "result.json")
        write_json(asked, asdict(job))
        words = [
            sys.executable,
            "-m",
            "megatron_ft.evaluation.measuring.worker",
            "--job",
            str(asked),
            "--result",
            str(told),
        ]
        if job.processes > 1:
            words += ["--nproc_per_node", str(job.processes)]
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        if told.exists():  # also where a process ended for lack of memory, and its launcher ended the others
            return Measured.from_json(read_json(told))
    if done.returncode == ConfigError.exit_code:
        raise ConfigError(f"{job.bits} bits: {_message(done.stderr)}")
    return Measured(job.bits, job.backend, failed=_why(done.returncode, done.stderr))


def _message(stderr: str) -> str:
    """Return the text after "error:" of a process that ended with a user's mistake."""
    found = re.findall(r"^\S.*?: error: (.*)$", stderr, re.MULTILINE)
    return found[-1] if found else stderr.strip()[-300:]


def _why(code: int, stderr: str) -> str:
    """Return in one line why a process ended."""
    if code == -signal.SIGKILL:
        return KILLED
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    lines = [line for line in stderr.splitlines() if line.strip()]
    return " ".join((lines or [f"exit code {code}"])[-1].split())[:300]

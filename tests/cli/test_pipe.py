"""Output that nobody reads to its end is no error of ours."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_reader_that_has_seen_enough():
    """As in `megatron-ft ... | head -1`: no traceback, and the exit code of a closed pipe."""
    script = (
        "from dataclasses import dataclass\n"
        "from megatron_ft.config.cli import Command, run_script\n"
        "@dataclass\nclass Nothing:\n    'Nothing'\n"
        "def run(_):\n    for i in range(100000):\n        print('line', i, flush=True)\n"
        "raise SystemExit(run_script(Command('talk', 'talks', (Nothing,)), run, []))\n"
    )
    talk = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert talk.stdout.readline() == b"line 0\n"
    talk.stdout.close()
    assert talk.stderr.read() == b"" and talk.wait(30) == 141

"""The short forms of the campaigns on saves and jobs (benchmarks/): the scripts themselves, with fewer kills, faults, flips and stops."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def campaign(script, *words) -> str:
    """What a script of benchmarks/ printed; it has to find nothing wrong."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def count(text: str, what: str) -> int:
    return int(re.search(rf"{what}: ([\d,]+)", text)[1].replace(",", ""))


def test_killed_in_saves():
    said = campaign("kill_in_save.py", "--kills", 30, "--seed", 11)
    assert count(said, "kills") == 30 and count(said, "kills inside a save") > 20


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_operations_of_a_save_that_fail():
    said = campaign("io_faults.py", "--every", 53)
    assert count(said, "faults") > 25 and count(said, "wrong") == 0


def test_lines_of_a_save_that_fail():
    said = campaign("line_faults.py", "--every", 101)
    assert count(said, "faults") > 25 and count(said, "wrong") == 0


def test_flipped_bits_of_checkpoints():
    said = campaign("run_checkpoint_flips.py", "--flips", 800, "--seed", 11)
    assert "800 flips: 800 refused by name, 0 refused without the file's name, 0 accepted, 0 crashed" in said


def test_killed_jobs():
    """Two ranks, ten steps, saves after each fifth: killed twice, the end is the undisturbed run's to the bit."""
    said = campaign("kill_jobs.py", "--kills", 2, "--steps", 10, "--seed", 11)
    assert count(said, "kills") == 2 and count(said, "equal to the undisturbed run") == 1


def test_jobs_asked_to_stop():
    said = campaign("stop_jobs.py", "--stops", 6, "--ranks", 1, "--seed", 11)
    assert count(said, "stops") == 6

"""The campaigns of benchmarks/ on shards, in their short forms."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import fuzz_readers, shard_flips

ROOT = Path(__file__).resolve().parents[2]


def test_no_flipped_bit_is_trained_on(tmp_path):
    result = shard_flips.campaign(tmp_path, 400, seed=7)
    assert (result.refused, result.accepted, result.unnamed, result.crashed) == (400, [], [], [])


@pytest.mark.parametrize("name", fuzz_readers.TARGETS)
def test_damaged_input_is_refused_or_sound(name):
    before = fuzz_readers.peak()
    found, _ = fuzz_readers.fuzz(name, 4000, seed=7)
    assert found.total() == 4000 and found["refused"] > 2000
    assert fuzz_readers.peak() - before < 200e6


def test_a_flip_that_nobody_looks_for_is_counted(tmp_path):
    """The counting itself: a reader that takes everything."""
    from benchmarks.bit_flips import flip_bits

    (tmp_path / "x").write_bytes(b"hello")
    result = flip_bits([tmp_path / "x"], lambda: None, 10)
    assert (result.refused, len(result.accepted), result.total) == (0, 10, 10)
    assert (tmp_path / "x").read_bytes() == b"hello"


def test_killed_runs_leave_nothing_half_done():
    script = [sys.executable, "benchmarks/kill_pretokenizer.py", "--kills", "6", "--chats", "200"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # Where in a run the kills fell is chance; on a busy machine they all may fall early.
    assert "killed: 6," in done.stdout

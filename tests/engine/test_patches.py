"""Each change to the engine's inside names what it changes, and says so where that is gone.

A rank is asked: the engine is never started in this process.
"""

import subprocess
import sys

import pytest

from megatron_ft.engine.versions import SUPPORTED, TRIED, release
from tests.engine import jobs
from tests.ranks import Ranks


@pytest.fixture(scope="module")
def rank():
    ranks = Ranks(1)
    yield lambda function, *args: ranks.run(function, *args)[0]
    ranks.close()


def test_a_part_that_is_gone_is_named_with_what_changes_it(rank):
    errors = rank(jobs.errors_without_each_part)
    installed = rank(jobs.version)
    assert len(errors) == 11 and all(errors.values())
    for name, found in errors.items():
        for part, error in found:
            assert error is not None, f"{name} did not miss {part}"
            assert error.startswith(f"{part}: not in megatron-core {installed}, and {name} changes it")
            assert all(version in error for version in TRIED) and "\n" not in error


def test_changes_are_for_releases_that_were_tried(rank):
    found = rank(jobs.ranges)
    assert len(found) == 10
    assert all(first in SUPPORTED and last in SUPPORTED for first, last in found.values())


def test_changes_are_made(rank):
    assert rank(jobs.changed_parts) == {
        "load_bytes": "megatron_ft.engine.patches",
        "CheckpointWithoutOutput": "megatron_ft.engine.patches",
        "apply_rotary_pos_emb": "megatron_ft.models.rotary",
        "_results_queue": "_queue",
    }


def test_a_change_for_other_releases_is_left_alone(rank):
    major, minor = release(rank(jobs.version))
    assert rank(jobs.run_for, f"{major}.{minor} to {major}.{minor}") == ["made"]
    assert rank(jobs.run_for, f"{major}.{minor} to {major}.{minor + 1}") == ["made"]
    assert rank(jobs.run_for, f"{major}.{minor + 1} to {major + 1}.0") == []
    assert rank(jobs.run_for, f"0.1 to {major}.{minor - 1}") == []


def test_the_engine_starts_without_triton():
    """torch's build for CPUs does not bring it. Of the supported releases only 0.19 asks for it."""
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "from megatron_ft.engine.start import prepare_engine; prepare_engine()\n"
        "from megatron_ft.training import setup, step; from megatron_ft.models import build"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

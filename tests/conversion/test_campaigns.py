"""Short forms of the campaigns in benchmarks/, each with the full one's code."""

import pytest

from benchmarks import fuzz_checkpoints


@pytest.mark.parametrize("name", fuzz_checkpoints.TARGETS)
def test_damaged_files_are_refused_or_read(name):
    before = fuzz_checkpoints.peak()
    found, _ = fuzz_checkpoints.fuzz(name, 1500, seed=7)
    assert found["refused"] > 500
    assert fuzz_checkpoints.peak() - before < 200e6

"""Short forms of the campaigns in benchmarks/, each with the full one's code."""

import pytest

from benchmarks import checkpoint_flips, fuzz_checkpoints, fuzz_readers, hostile_files


@pytest.mark.parametrize("name", fuzz_checkpoints.TARGETS)
def test_damaged_files_are_refused_or_read(name):
    before = fuzz_readers.peak()
    found, _ = fuzz_checkpoints.fuzz(name, 1500, seed=7)
    assert found["refused"] > 500
    assert fuzz_readers.peak() - before < 200e6


def test_no_payload_runs_in_any_place(one_rank, tmp_path):
    """Faults 25 to 28: planted pickles, files that lie elsewhere, headers and configs that lie, before every command."""
    ((counts, wrong),) = one_rank.run(hostile_files.campaign, tmp_path, True)
    assert wrong == []
    assert counts["payloads that a careless reader runs"] > 20 and counts["hostile files"] >= 60
    assert counts["payloads that ran"] == 0


def test_no_flipped_bit_is_accepted(tmp_path):
    for kind, result in checkpoint_flips.campaign(tmp_path / "made", 600, seed=7).items():
        assert result.refused == result.total > 100, (kind, str(result), result.accepted[:3], result.unnamed[:3])

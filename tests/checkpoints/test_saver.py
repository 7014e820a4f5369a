"""A save that fails on one rank fails on all, leaves nothing behind, and the next one goes on as if it had never begun."""

import errno
import os
from functools import partial

import pytest

from megatron_ft.digests import check_digests
from megatron_ft.errors import CheckpointError, PassingFault
from tests.checkpoints import save_jobs as jobs


def left(root):
    """All names below the folder of a run, those of unfinished saves included."""
    return sorted(path.name for path in root.iterdir())


AFTERWARDS = ["iter_0000001", "iter_0000003", "latest_checkpointed_iteration.txt"]
"""What is there after a save, one that failed, and another."""


@pytest.mark.parametrize("error", [MemoryError(), MemoryError("32 GiB"), RuntimeError("a bug")], ids=repr)
def test_a_rank_that_cannot_prepare_its_part(error, four_ranks, tmp_path):
    """A bug or a lack of memory on one rank: all raise, the others in the words of that one, which keeps its own type and traceback."""
    said = four_ranks.run(jobs.save_with_a_fault, str(tmp_path), partial(jobs.raising, error), timeout=60)
    kind, text = type(error).__name__, str(error)
    assert (said[2]["type"], said[2]["text"]) == (kind, text)
    words = f"rank 2: {kind}: {text}" if text else f"rank 2: {kind}"
    assert {(said[rank]["type"], said[rank]["text"]) for rank in (0, 1, 3)} == {("RuntimeError", words)}
    assert [one["code"] for one in said] == [1] * 4
    assert [one["after"] for one in said] == [[3]] * 4
    assert left(tmp_path) == AFTERWARDS


@pytest.mark.parametrize(
    ("error", "kind", "text", "code"),
    [
        (CheckpointError("what, where, how"), "CheckpointError", "what, where, how", 2),
        (PassingFault("try again"), "PassingFault", "try again", 1),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x"), "CheckpointError", "x: no space left on device; free", 2),
        (OSError(errno.EIO, os.strerror(errno.EIO), "x"), "PassingFault", "x: input/output error; earlier", 1),
    ],
    ids=["a user's", "one that passes", "a full disk", "a broken disk"],
)  # fmt: skip
def test_what_a_user_can_mend_stays_that(error, kind, text, code, four_ranks, tmp_path):
    said = four_ranks.run(jobs.save_with_a_fault, str(tmp_path), partial(jobs.raising, error), timeout=60)
    assert said == [said[0]] * 4
    assert (said[0]["type"], said[0]["code"]) == (kind, code) and said[0]["text"].startswith(text)
    assert left(tmp_path) == AFTERWARDS


@pytest.mark.parametrize(
    ("error", "text", "code"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x"), "x: no space left on device; free some space", 2),
        (MemoryError("32 GiB"), "rank 0: MemoryError: 32 GiB", 1),
    ],
    ids=["a full disk", "no memory"],
)
def test_a_folder_that_the_first_rank_cannot_make(error, text, code, four_ranks, tmp_path):
    said = four_ranks.run(jobs.save_without_a_folder, str(tmp_path), error, timeout=60)
    assert all(one["text"].startswith(text) for one in said[1:]) and said[0]["text"] in (said[1]["text"], str(error))
    assert [(one["code"], one["prepared"]) for one in said] == [(code, False)] * 4
    assert left(tmp_path) == []


def test_a_bug_in_a_background_writer(four_ranks, tmp_path):
    """It is named on all ranks; the writers of the others, which would run for an hour, are killed."""
    said = four_ranks.run(jobs.save_with_a_fault, str(tmp_path), jobs.bug_in_the_background, True, timeout=60)
    assert said[2]["text"] == "LookupError: no such thing"
    assert {said[rank]["text"] for rank in (0, 1, 3)} == {"rank 2: RuntimeError: LookupError: no such thing"}
    assert [(one["code"], one["children"], one["after"]) for one in said] == [(1, 0, [3])] * 4
    assert left(tmp_path) == AFTERWARDS


def test_a_background_writer_that_cannot_start(four_ranks, tmp_path):
    said = four_ranks.run(jobs.save_without_a_process, str(tmp_path), timeout=60)
    assert said == [said[0]] * 4
    assert (said[0]["type"], said[0]["children"], said[0]["after"]) == ("PassingFault", 0, [3])
    assert said[0]["text"].startswith("cannot allocate memory; earlier checkpoints are complete")
    assert left(tmp_path) == AFTERWARDS


def test_leaving_while_a_save_is_under_way(four_ranks, tmp_path):
    """What is not committed is dropped: no writer works on, no folder is left; the checkpoint before is the newest."""
    said = four_ranks.run(jobs.leave_while_saving, str(tmp_path), timeout=60)
    assert said == [{"during": 1, "after": 0}] * 4
    assert left(tmp_path) == ["iter_0000001", "latest_checkpointed_iteration.txt"]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "1\n"
    check_digests(tmp_path / "iter_0000001")


def test_an_old_checkpoint_that_cannot_be_deleted(one_rank, tmp_path):
    """The run goes on and says which one to delete; the others are deleted."""
    (said,) = one_rank.run(jobs.save_beside_one_that_stays, str(tmp_path))
    assert said["saved"] == [1, 2, 3]
    line = f"{tmp_path}/iter_0000001 could not be deleted (device or resource busy); delete it by hand"
    assert line in said["log"]
    assert left(tmp_path) == ["iter_0000001", "iter_0000003", "latest_checkpointed_iteration.txt"]
    check_digests(tmp_path / "iter_0000001")

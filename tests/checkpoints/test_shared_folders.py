"""Several machines and jobs on one folder: what each of them sees there, and that no checkpoint is made of halves."""

import errno
from pathlib import Path

from megatron_ft.checkpoints.folder import write_tracker


def test_ranks_that_would_begin_from_different_checkpoints(four_ranks, tmp_path):
    """Another job saves between two ranks' looks at the folder, or one machine's disk errs: nothing is trained from halves of two."""
    run = tmp_path / "run"
    for number in (2, 4):
        (run / f"iter_000000{number}").mkdir(parents=True)
    write_tracker(run, 4)
    said = four_ranks.run(look_and_agree, str(run), False)
    assert {one.split(": ")[0] for one in said} == {"PassingFault"} and len(set(said)) == 1
    assert "rank 0 would begin from" in said[0] and "and rank 3 from" in said[0]
    said = four_ranks.run(look_and_agree, str(run), True)
    assert len(set(said)) == 1 and "was changed by another job while this one started" in said[0]
    assert set(four_ranks.run(look_and_agree, str(run), None)) == {"agreed"}


def look_and_agree(root, late):
    """choosing.agree where rank 3 sees an older checkpoint (late: all of them do, and then one more is there; None: all see the same)."""
    from megatron_ft.checkpoints import select
    from megatron_ft.config.sections import Checkpointing
    from megatron_ft.engine.parallel import process_groups
    from megatron_ft.errors import UserError

    with process_groups() as layout:
        asked = Checkpointing(load=root, save=root)
        folders = select.candidates(Path(root))
        seen = folders if late is None or (not late and layout.rank < 3) else folders[1:]
        try:
            select.agree(seen, 0, asked, layout)
        except UserError as error:
            return f"{type(error).__name__}: {error}"
    return "agreed"


def test_a_disk_of_ones_own_is_no_place_to_save(one_rank, tmp_path):
    ((missing, elsewhere),) = one_rank.run(commit_without_a_file, str(tmp_path))
    assert "mp_rank_01/model_optim_rng.pt was written by a process, but the first process does not see it" in missing
    assert "is not the folder that the first process writes to" in elsewhere and not (tmp_path / "gone").exists()


def commit_without_a_file(root):
    from megatron_ft.checkpoints import saver, writer
    from megatron_ft.digests import Entry
    from megatron_ft.errors import UserError

    said = []
    saver._PATIENCE = 0.1
    for act in (
        lambda: saver._check_there(Path(root), {"mp_rank_01/model_optim_rng.pt": Entry(5, "x")}),
        lambda: writer.write(writer.Part(Path(root) / "gone" / "here", {"a/b": lambda path: path.touch()})),
    ):
        try:
            act()
        except UserError as error:
            said.append(str(error))
    return said


def test_where_nothing_can_be_locked_nothing_is_swept(one_rank, tmp_path):
    """Without locks what looks like a leftover may be another job's save under way."""
    (tmp_path / ".iter_0000005.tmp-1-abc").mkdir()
    one_rank.run(lock_without_locks, str(tmp_path))
    assert (tmp_path / ".iter_0000005.tmp-1-abc").is_dir()


def lock_without_locks(root):
    from megatron_ft.checkpoints import lock
    from megatron_ft.engine.parallel import process_groups

    def refuse(*_):
        raise OSError(errno.ENOSYS, "no locks here")

    flock, lock.fcntl.flock = lock.fcntl.flock, refuse
    try:
        with process_groups() as layout, lock.FolderLock(Path(root), layout):
            pass
    finally:
        lock.fcntl.flock = flock


def test_a_lock_takes_its_empty_folder_along(one_rank, tmp_path):
    one_rank.run(lock_and_leave, str(tmp_path / "new" / "run"))
    assert not (tmp_path / "new" / "run").exists()


def lock_and_leave(root):
    from megatron_ft.checkpoints import lock
    from megatron_ft.engine.parallel import process_groups

    with process_groups() as layout, lock.FolderLock(Path(root), layout):
        assert Path(root, ".lock").is_file()

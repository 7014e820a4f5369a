"""The lock on --save: who holds it is said, and one that is removed while another job waits for it is not taken for a lock."""

import fcntl
import json
import os
from pathlib import Path

import pytest

from megatron_ft.checkpoints import lock
from megatron_ft.errors import CheckpointError, PassingFault


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / lock.LOCK


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_PATIENCE", 0.0)
    monkeypatch.setattr(lock, "_PATIENCE_WITH_OURSELVES", 0.0)


def refused(path: Path, text: str) -> CheckpointError:
    """Ask for a lock that is held, with `text` in its file."""
    path.parent.mkdir()
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError) as caught:
            lock._acquire(path)
        assert path.read_text() == text
    return caught.value


def is_locked(path: Path) -> bool:
    with open(path) as other:
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_folder_that_its_holder_has_removed_is_made_again(path: Path) -> None:
    file, locked = lock._acquire(path)
    with file:
        assert locked and is_locked(path)
        assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("again", [False, True], ids=["removed", "made again by a third"])
def test_a_file_removed_between_opening_and_locking(again: bool, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is locked then is a file without a name, which keeps nobody out: it is tried again with the one that is there."""
    flock, calls = fcntl.flock, []

    def late(file: object, operation: int) -> None:
        if not calls:
            path.unlink()
            if again:
                path.touch()
        calls.append(operation)
        flock(file, operation)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    file, locked = lock._acquire(path)
    monkeypatch.undo()
    with file:
        assert locked and len(calls) == 2
        assert os.path.samestat(os.fstat(file.fileno()), os.stat(path)) and is_locked(path)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": "node3"}', "7"])
def test_a_holder_that_has_not_said_who_it_is(text: str, path: Path) -> None:
    error = refused(path, text)
    assert str(error) == f"{path.parent} is in use by another job: use another --save folder, or end that job first"
    assert error.exit_code == 2


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("mine", "code"), [("41", 1), ("42", 2), (None, 2)])
def test_an_earlier_start_of_this_job(mine: str | None, code: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM starts a job again while a process of its last start may still end: launchers try that again, not a job of another."""
    if mine is None:
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    else:
        monkeypatch.setenv("SLURM_JOB_ID", mine)
    error = refused(path, json.dumps({"host": "node3", "pid": 12, "job": "41"}))
    assert error.exit_code == code and isinstance(error, PassingFault) == (code == 1)
    assert "(process 12 on node3, job 41)" in str(error)
    assert ("by an earlier start of this job" in str(error)) == (code == 1)

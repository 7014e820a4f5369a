"""What the system answers to a rank that writes reaches the user as that: which file, and why."""

import errno
import gc
import os
from pathlib import Path

import pytest
import torch

from megatron_ft.checkpoints.writer import Part, _system_error, save_tensors, write
from megatron_ft.engine.collective_errors import refusal

FULL = Path("/dev/full")
"""Every write to it is answered by "no space left on device"."""

pytestmark = pytest.mark.skipif(not FULL.exists(), reason="a system without /dev/full")


def test_tensors_on_a_full_disk():
    """torch's writer only says that the end is missing; behind it is the system's error."""
    with pytest.raises(OSError) as caught:
        save_tensors({"x": torch.zeros(1 << 18)}, FULL)
    assert caught.value.errno == errno.ENOSPC
    assert "no space left on device; free some space" in str(refusal(caught.value))


def test_a_files_name_is_in_the_error(tmp_path):
    (tmp_path / "common.pt").symlink_to(FULL)
    with pytest.raises(OSError) as caught:
        write(Part(tmp_path, {"common.pt": lambda path: save_tensors({"x": torch.zeros(1 << 18)}, path)}))
    assert str(refusal(caught.value)).startswith(f"{tmp_path}/common.pt: no space left on device")


def test_an_error_that_only_torch_reports():
    """Given a name instead of a file, torch's own writer does not say what the system answered: it may pass, the file is named."""
    with pytest.raises(RuntimeError) as caught:
        torch.save({"x": torch.zeros(1 << 18)}, str(FULL))
    found = _system_error(caught.value, FULL)
    assert isinstance(found, OSError) and found.errno == errno.EIO
    assert str(refusal(found)).startswith("/dev/full: the disk did not take all that was written; earlier checkpoints")


class Unwilling:
    def __reduce__(self):
        raise RuntimeError("not to be saved")


def test_a_bug_is_not_taken_for_the_disks_fault(tmp_path):
    with pytest.raises(RuntimeError, match=r"^not to be saved$"):
        save_tensors({"x": Unwilling()}, tmp_path / "common.pt")


def test_a_bucket_on_a_full_disk(one_rank, tmp_path):
    """The engine's code writes it; what it hands back of a failure is the system's error with the file's name."""
    ((kind, number, text),) = one_rank.run(save_into_a_full_bucket, str(tmp_path))
    assert (kind, number) == ("OSError", errno.ENOSPC)
    assert text.startswith(f"{tmp_path}/__0_0.distcp: no space left on device; free some space")


def save_into_a_full_bucket(root):
    from benchmarks.small_saves import _plan
    from megatron_ft.checkpoints.training_state import Progress
    from megatron_ft.checkpoints.writer import Here
    from megatron_ft.engine.parallel import process_groups

    with process_groups() as layout:
        part = _plan(layout, Path(root), Progress(1, 1)).part
        Path(part.buckets[0][0]).symlink_to(FULL)
        writer = Here(part)
    return type(writer.problem).__name__, writer.problem.errno, str(refusal(writer.problem))


def test_a_forked_writer_never_collects_garbage(one_rank, tmp_path):
    """Objects of the trainer that it inherits cannot be destroyed there, not even by what runs before it: that was a SIGSEGV."""
    assert one_rank.run(fork_a_writer, str(tmp_path)) == [(None, True)]
    assert (tmp_path / "after fork").read_text() == "False" == (tmp_path / "put").read_text()


def fork_a_writer(root):
    from megatron_ft.checkpoints.writer import Forked

    def look(path):
        if Path(root).is_dir():  # the hook stays, in this rank
            path.write_text(str(gc.isenabled()))

    os.register_at_fork(after_in_child=lambda: look(Path(root) / "after fork"))
    gc.enable()
    writer = Forked(Part(Path(root), {"put": look}))
    writer.wait()
    return writer.problem, gc.isenabled()

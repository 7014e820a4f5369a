"""Verifying and loading read a checkpoint's description once, and again when its files are others."""

import shutil
from pathlib import Path

import pytest

from megatron_ft.checkpoints import verify
from megatron_ft.errors import CheckpointError


@pytest.fixture
def folder(checkpoint: str, tmp_path: Path) -> Path:
    shutil.copytree(Path(checkpoint) / "release", tmp_path / "release")
    return tmp_path / "release"


def test_the_files_are_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    for name in ("read_metadata", "read_tensors"):
        original = getattr(verify, name)
        monkeypatch.setattr(verify, name, lambda path, f=original: (read.append(path.name), f(path))[1])
    first, second = verify.read_description(folder), verify.read_description(folder)
    assert read == [".metadata", "common.pt"] and first is second
    assert first.metadata.state_dict_metadata


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_a_file_that_changes_is_read_again(folder: Path, name: str) -> None:
    verify.read_description(folder)
    data = bytearray((folder / name).read_bytes())
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        verify.read_description(folder)
    (folder / name).write_bytes(bytes(data))
    assert verify.read_description(folder).metadata

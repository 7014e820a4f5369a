"""What a checkpoint's .metadata may name."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_ft.checkpoints.restricted import read_metadata
from megatron_ft.errors import CheckpointError


def write(path: Path) -> Path:
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([4]))
    entry = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size([4]), [chunk])
    path.write_bytes(pickle.dumps(Metadata(state_dict_metadata={"weight": entry}, storage_data={})))
    return path


@pytest.mark.parametrize(
    "reduced",
    [
        pytest.param(lambda member, _: (getattr, (type(member), member.name)), id="3.11.0 to 3.11.3"),
        pytest.param(lambda member, _: (type(member), (member.value,)), id="the others"),
    ],
)
def test_members_of_enumerations_as_every_python_pickles_them(
    reduced: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Debian 12's own Python is 3.11.2: what it saves is read everywhere, by itself too."""
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", reduced)
    found = read_metadata(write(tmp_path / ".metadata"))
    entry = found.state_dict_metadata["weight"]
    assert isinstance(entry, TensorStorageMetadata)
    assert entry.properties.memory_format == torch.contiguous_format
    assert entry.properties.dtype == torch.float32


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Metadata, "__init__"),
        (_MEM_FORMAT_ENCODING, "mro"),
        (_MEM_FORMAT_ENCODING, "__init_subclass__"),
        (os.system, "__call__"),
        (torch.Size, "numel"),
    ],
)
def test_getattr_of_anything_else_is_refused(
    owner: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", lambda member, _: (getattr, (owner, name)))
    path = write(tmp_path / ".metadata")
    with pytest.raises(CheckpointError, match="damaged or not a checkpoint's"):
        read_metadata(path)

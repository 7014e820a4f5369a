"""What a checkpoint's .metadata may name."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_ft.checkpoints.restricted import file_slice, read_metadata
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


def entry(size: Any = (4,), chunks: Any = None, dtype: Any = torch.float32) -> TensorStorageMetadata:
    size = torch.Size(size)
    whole = [ChunkStorageMetadata(torch.Size([0] * len(size)), size)]
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, whole if chunks is None else chunks)


def description(entries: Any = None, places: Any = None) -> Metadata:
    entries = {"weight": entry()} if entries is None else entries
    return Metadata(state_dict_metadata=entries, storage_data={} if places is None else places)


def place(path: Any = "__0_0.distcp", offset: Any = 0, length: Any = 9) -> _StorageInfo:
    return _StorageInfo(path, offset, length)


HERE = MetadataIndex("weight", torch.Size([0]))
REFUSED = {
    "not a description": ({"weight": 1}, "not the metadata of a torch_dist checkpoint"),
    "no places": (description(places=[]), "not the metadata of a torch_dist checkpoint"),
    "an entry of another type": (description({"weight": 5}), "an entry is no tensor's"),
    "a name that is no text": (description({5: entry()}), "an entry is no tensor's"),
    "no type": (description({"weight": entry(dtype="float32")}), "weight has no type, or no parts"),
    "parts in a tuple": (description({"weight": entry(chunks=())}), "weight has no type, or no parts"),
    "a part of another shape": (
        description({"weight": entry(chunks=[ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 2]))])}),
        "weight: a part of another shape",
    ),
    "a huge size": (description({"weight": entry((1 << 48,))}), "a size that is none"),
    "a negative size": (description({"weight": entry((-1,))}), "a size that is none"),
    "a part's size in a list": (
        description({"weight": entry(chunks=[ChunkStorageMetadata(torch.Size([0]), [4])])}), "a size that is none",
    ),
    "nine axes": (description({"weight": entry([1] * 9)}), "it copies what is long"),
    "a place for no tensor": (description(places={"weight": place()}), "a place is no place"),
    "a tensor whose name is a number": (description(places={MetadataIndex(5): place()}), "a place is no place"),
    "a place of another type": (description(places={HERE: "__0_0.distcp"}), "a place is no place"),
    "before the file": (description(places={HERE: place(offset=-1)}), "weight is in no file"),
    "a length that is no number": (description(places={HERE: place(length=True)}), "weight is in no file"),
    "beyond any file": (description(places={HERE: place(length=1 << 62)}), "weight is in no file"),
    "a file that is no text": (description(places={HERE: place(path=7)}), "weight is in no file"),
    "a file elsewhere": (description(places={HERE: place(path="../x")}), "names '../x', outside its own folder"),
    "a file anywhere": (description(places={HERE: place(path="/etc/x")}), "names '/etc/x', outside its own folder"),
}  # fmt: skip


def test_what_is_as_it_should_be_is_read(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(description(places={HERE: place()})))
    found = read_metadata(tmp_path / ".metadata")
    assert found == description(places={HERE: place()})


@pytest.mark.parametrize("kind", REFUSED)
def test_a_description_that_makes_no_sense(kind: str, tmp_path: Path) -> None:
    """Each value is of a type that the file may hold, at a place where it would mislead a reader."""
    value, reason = REFUSED[kind]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(value))
    with pytest.raises(CheckpointError) as caught:
        read_metadata(tmp_path / ".metadata")
    assert str(tmp_path / ".metadata") in str(caught.value) and reason in str(caught.value)


@pytest.mark.parametrize("name", ["builtins set", "collections OrderedDict", "torch Size"])
def test_a_long_list_is_not_copied(name: str, tmp_path: Path) -> None:
    """By hand: a call of a container with a list of nine; a file of kilobytes could do so with a long list a thousand times."""
    nine = pickle.EMPTY_LIST + pickle.MARK + b"K\x01" * 9 + pickle.APPENDS
    call = pickle.GLOBAL + name.replace(" ", "\n").encode() + b"\n" + nine + pickle.TUPLE1 + pickle.REDUCE
    (tmp_path / ".metadata").write_bytes(pickle.PROTO + b"\x04" + call + pickle.STOP)
    with pytest.raises(CheckpointError, match="it copies what is long"):
        read_metadata(tmp_path / ".metadata")


def test_a_part_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "__0_0.distcp"
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is missing; restore it"):
        file_slice(path, 0, 1)
    path.write_bytes(b"0123456789")
    assert file_slice(path, 2, 8).read() == b"23456789"
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is cut short: 11 bytes needed"):
        file_slice(path, 2, 9)

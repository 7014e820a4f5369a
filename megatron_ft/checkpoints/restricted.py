"""Reads files of other programs without running code in them.

torch.distributed.checkpoint unpickles .metadata without limits; here it may contain only the types that such a file needs.
"""

from __future__ import annotations

import enum
import io
import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_ft.errors import CheckpointError
from megatron_ft.models.plain_pickle import PlainUnpickler

_AXES = 8  # more than any tensor of a model or its optimizer has


def _few(make: Any) -> Any:
    """Return a container of at most a few objects: a malicious file could copy a long one again and again."""

    def made(values: Any = ()) -> Any:
        if len(values) > _AXES:
            raise pickle.UnpicklingError("it copies what is long")
        return make(values)

    return made


def _member(owner: Any, name: Any) -> Any:
    """Return a member of an enumeration by its name. Python 3.11.0 to 3.11.3 pickle it so: getattr(class, name)."""
    if not isinstance(owner, enum.EnumType) or owner not in _ALLOWED.values() or name not in owner.__members__:
        raise pickle.UnpicklingError("it uses getattr for more than a member of an enumeration")
    return owner[name]


_ALLOWED: dict[tuple[str, str], Any] = {
    ("builtins", "getattr"): _member,
    **{
        (module.__name__, name): getattr(module, name)
        for module, names in (
            (
                metadata,
                "Metadata MetadataIndex TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata "
                "TensorProperties StorageMeta _MEM_FORMAT_ENCODING",
            ),
            (filesystem, "_StorageInfo _StoragePrefix"),
            (planner, "SavePlan WriteItem WriteItemType TensorWriteData"),
        )
        for name in names.split()
    },
    ("torch", "Size"): _few(torch.Size),
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    # A file written on another system names that system's path type; only the text matters.
    **{
        ("pathlib", name): pathlib.PurePath for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
    ("pathlib._local", "PosixPath"): pathlib.PurePath,
    ("collections", "OrderedDict"): _few(dict),
    ("builtins", "set"): _few(set),
}


def _find(module: str, name: str) -> Any:
    if (module, name) in _ALLOWED:
        return _ALLOWED[module, name]
    value = getattr(torch, name, None) if module == "torch" else None
    if isinstance(value, torch.dtype):
        return value
    raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_metadata(path: Path) -> Metadata:
    """Return a checkpoint's .metadata. Raise CheckpointError if it is missing, damaged, or contains other types than its own."""
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: the save was not finished; read an earlier iteration with --iteration"
        )
    try:
        found = PlainUnpickler(path.read_bytes(), _find).load()
        _check(found)
    except Exception as error:  # a damaged pickle can raise any exception
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint's ({str(error)[:200]}); read an earlier iteration"
        ) from error
    for info in found.storage_data.values():
        if Path(info.relative_path).name != info.relative_path or "\0" in info.relative_path:
            raise CheckpointError(
                f"{path} names {info.relative_path!r}, outside its own folder; do not trust this file"
            )
    return found


def _check(found: Any) -> None:
    """Raise ValueError unless it is metadata in which every entry and every place is of the type it should be."""
    if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
        raise ValueError("it is not the metadata of a torch_dist checkpoint")
    for name, entry in found.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata | BytesStorageMetadata):
            raise ValueError("an entry is no tensor's")
        if isinstance(entry, TensorStorageMetadata):
            _check_sizes(entry.size)
            if not isinstance(entry.properties.dtype, torch.dtype) or not isinstance(entry.chunks, list):
                raise ValueError(f"{name} has no type, or no parts")
            for chunk in entry.chunks:
                _check_sizes(chunk.sizes)
                _check_sizes(chunk.offsets)
                if not len(chunk.sizes) == len(chunk.offsets) == len(entry.size):
                    raise ValueError(f"{name}: a part of another shape")
    for index, info in found.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(index.fqn, str) or type(info) is not _StorageInfo:
            raise ValueError("a place is no place")
        if index.offset is not None:
            _check_sizes(index.offset)
        numbers = (info.offset, info.length)
        if any(type(n) is not int or not 0 <= n < 1 << 62 for n in numbers) or not isinstance(info.relative_path, str):
            raise ValueError(f"{index.fqn} is in no file")


def _check_sizes(sizes: Any) -> None:
    if not isinstance(sizes, torch.Size) or len(sizes) > _AXES or any(not 0 <= n < 1 << 48 for n in sizes):
        raise ValueError("a size that is none")


def file_slice(path: Path, offset: int, length: int) -> io.BytesIO:
    """Return bytes [offset, offset + length) of a file. Raise CheckpointError if it is missing or shorter."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; restore it, or read another iteration with --iteration")
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(length)
    if len(data) != length:
        raise CheckpointError(
            f"{path} is cut short: {offset + length} bytes needed; restore it, or read another iteration"
        )
    return io.BytesIO(data)

"""Reading files of others without running what may be planted in them.

torch.distributed.checkpoint unpickles .metadata freely; here it may name only the types that such a file needs.
"""

from __future__ import annotations

import io
import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import Metadata

from megatron_ft.errors import CheckpointError

_ALLOWED: dict[tuple[str, str], Any] = {
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
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    # A file written on another system names that system's path type; only the text matters.
    **{
        ("pathlib", name): pathlib.PurePath for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
    ("pathlib._local", "PosixPath"): pathlib.PurePath,
    ("collections", "OrderedDict"): dict,
    ("builtins", "set"): set,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, torch.dtype):
            return value
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_metadata(path: Path) -> Metadata:
    """A checkpoint's .metadata. Raises CheckpointError when missing, damaged, or naming other types than its own."""
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: the save was not finished; read an earlier iteration with --iteration"
        )
    try:
        with open(path, "rb") as file:
            found = _Unpickler(file).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint's ({error}); read an earlier iteration"
        ) from error
    if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
        raise CheckpointError(f"{path} is not the metadata of a torch_dist checkpoint; read an earlier iteration")
    for info in found.storage_data.values():
        if Path(info.relative_path).name != info.relative_path:
            raise CheckpointError(
                f"{path} names {info.relative_path!r}, outside its own folder; do not trust this file"
            )
    return found


def file_slice(path: Path, offset: int, length: int) -> io.BytesIO:
    """Bytes [offset, offset + length) of a file. Raises CheckpointError when it is missing or shorter."""
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

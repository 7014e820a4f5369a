"""Reads files of torch.save, one tensor at a time, without running code in them.

A pickle may contain tensors, plain containers and, for some dialects, a few harmless types that are replaced by empty objects. Any other
name is an error. Data is read on request, from its place in the zip file, and checked against its CRC.
"""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from megatron_ft.errors import CheckpointError
from megatron_ft.models.plain_pickle import PlainUnpickler

MAX_PICKLE = 1 << 25  # bytes of structure; a checkpoint's is far below
MAX_AXES = 8
_KINDS = {
    f"{name}Storage": dtype
    for name, dtype in (
        *(("Float", torch.float32), ("Half", torch.float16), ("BFloat16", torch.bfloat16), ("Double", torch.float64)),
        *(("Long", torch.int64), ("Int", torch.int32), ("Short", torch.int16), ("Char", torch.int8)),
        *(("Byte", torch.uint8), ("Bool", torch.bool)),
    )
}


_OTHER_TENSORS = {  # what torch.save or numpy names for tensors that are not read
    ("torch._utils", "_rebuild_sparse_tensor"): "holds sparse tensors: save them with .to_dense()",
    ("torch._utils", "_rebuild_qtensor"): "holds quantised tensors: give the unquantised model",
    ("torch._utils", "_rebuild_tensor_v3"): "holds numbers of 8 bits or fewer: give the unquantised model",
    (
        "torch._utils",
        "_rebuild_meta_tensor_no_storage",
    ): "holds tensors without numbers (device meta): save the loaded model",
    ("numpy._core.multiarray", "_reconstruct"): "holds arrays of numpy: save them with torch.from_numpy",
    ("numpy.core.multiarray", "_reconstruct"): "holds arrays of numpy: save them with torch.from_numpy",
}


class Inert:
    """Replaces an object of a type that is not created here: accepts any arguments, does nothing, stores its state."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update({key: value for key, value in state.items() if isinstance(key, str)})

    def __setitem__(self, key: Any, value: Any) -> None: ...
    def append(self, value: Any) -> None: ...
    def extend(self, values: Any) -> None: ...


@dataclass(frozen=True)
class _Storage:
    record: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor in a file, not read yet."""

    file: TorchFile
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    def read(self) -> Tensor:
        """Return the tensor in its own memory, not a map of the file, so that it can be freed."""
        return self.file.read(self)


class TorchFile:
    """An opened file; `value` is what was saved, with a TensorRef for every tensor.

    harmless: (module, name) -> whether such a type may become an Inert. Raise CheckpointError, naming the file.
    """

    def __init__(self, path: Path, harmless: Callable[[str, str], bool] = lambda module, name: False):
        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"{path} is missing; restore it, or read an earlier iteration with --iteration")
        self._handle = os.open(self.path, os.O_RDONLY)
        if other := other_kind(os.pread(self._handle, 300, 0), path):
            raise CheckpointError(f"{path} {other}")
        try:
            self._open(harmless)
        except CheckpointError:
            raise
        except (zipfile.BadZipFile, OSError, EOFError, ValueError, KeyError, StopIteration, struct.error) as error:
            raise CheckpointError(f"{path} is cut short or damaged ({_text(error)}); restore it") from error
        except Exception as error:  # a damaged pickle can raise any exception
            raise CheckpointError(
                f"{path} is damaged, or holds objects other than tensors and plain values ({_text(error)}): load it where its classes are, "
                f"and save the state_dict alone with torch.save"
            ) from error

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)

    def _open(self, harmless: Callable[[str, str], bool]) -> None:
        with zipfile.ZipFile(self.path) as archive:
            infos = {info.filename: info for info in archive.infolist()}
            size = os.path.getsize(self.path)
            for info in infos.values():
                if info.compress_type != zipfile.ZIP_STORED or info.header_offset + info.file_size > size:
                    raise zipfile.BadZipFile(f"{info.filename} lies outside the file, or is compressed")
            pickled = next((name for name in infos if name.endswith("/data.pkl")), None)
            if pickled is None:
                raise CheckpointError(
                    f"{self.path} is a zip archive, but not one of torch.save: unpack it, and give what is in it"
                )
            if infos[pickled].file_size > MAX_PICKLE:
                raise zipfile.BadZipFile("its structure is larger than any checkpoint's")
            self._root, self._infos = pickled.removesuffix("data.pkl"), infos
            order = infos.get(self._root + "byteorder")
            if order and archive.read(order) != b"little":
                raise zipfile.BadZipFile("written on a big-endian machine")
            self.value = PlainUnpickler(archive.read(pickled), self._finder(harmless), self.storage).load()

    def _finder(self, harmless: Callable[[str, str], bool]) -> Callable[[str, str], Any]:
        """Return the replacement of a name that torch.save writes."""
        known: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): self.tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("collections", "OrderedDict"): lambda: _Dict(),
            ("builtins", "dict"): lambda: _Dict(),
            ("torch", "Size"): lambda sizes: tuple(sizes) if len(sizes) <= MAX_AXES else _too_long(),
        }

        def find(module: str, name: str) -> Any:
            if (module, name) in known:
                return known[module, name]
            if module == "torch" and name in _KINDS:
                return _Kind(name)
            if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
                return getattr(torch, name)
            if harmless(module, name):
                return Inert
            if (module, name) in _OTHER_TENSORS:
                raise CheckpointError(f"{self.path} {_OTHER_TENSORS[module, name]}")
            raise pickle.UnpicklingError(f"it names {module}.{name}")

        return find

    def storage(self, identity: Any) -> _Storage:
        """Return what a persistent id names, checked against the size of its record."""
        _, kind, key, _, count = identity
        dtype = _KINDS.get(getattr(kind, "name", ""))
        info = self._infos.get(f"{self._root}data/{key}")
        if dtype is None or info is None or count * dtype.itemsize != info.file_size:
            raise zipfile.BadZipFile(f"record {key} does not hold {count} numbers")
        return _Storage(info.filename, dtype, count)

    def tensor(self, storage: _Storage, offset: int, shape: tuple, stride: tuple, *_: Any) -> TensorRef:
        shape, stride = tuple(shape), tuple(stride)
        sizes = [offset, *shape, *stride]
        plain = isinstance(storage, _Storage) and len(shape) == len(stride) <= MAX_AXES
        if not plain or any(type(n) is not int or not 0 <= n < 1 << 48 for n in sizes):
            raise zipfile.BadZipFile("a tensor's shape is no shape")
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if prod(shape) > storage.count or (prod(shape) and last >= storage.count):
            raise zipfile.BadZipFile("a tensor reaches beyond its record")
        return TensorRef(self, storage, offset, shape, stride)

    def read(self, ref: TensorRef) -> Tensor:
        """Return the tensor in its own memory, not a map of the file, so that it can be freed."""
        info = self._infos[ref.storage.record]
        if not info.file_size:
            return torch.empty(ref.shape, dtype=ref.dtype)
        header = os.pread(self._handle, 30, info.header_offset)
        names = struct.unpack("<2H", header[26:30]) if header[:4] == b"PK\3\4" else None
        start = None if names is None else info.header_offset + 30 + sum(names)
        data = None if start is None else read_at(self._handle, start, info.file_size)
        if data is None or zlib.crc32(data.numpy().data) != info.CRC:
            raise CheckpointError(
                f"{self.path} is damaged: the numbers of {ref.storage.record} are not those that were written; restore it"
            )
        return data.view(ref.dtype).as_strided(ref.shape, ref.stride, ref.offset)


def _too_long() -> None:
    raise pickle.UnpicklingError("it copies what is long")


class _Kind:
    """A storage class, by name."""

    def __init__(self, name: str):
        self.name = name


class _Dict(dict):
    """A module's state_dict carries versions of its parts as an attribute: not wanted."""

    def __setstate__(self, state: Any) -> None: ...


def read_at(handle: int, offset: int, size: int) -> Tensor | None:
    """Return `size` bytes as a tensor of uint8; None if the file ends before."""
    data = torch.empty(size, dtype=torch.uint8)
    view, done = data.numpy().data, 0
    while done < size:
        count = os.preadv(handle, [view[done : done + (1 << 30)]], offset + done)
        if not count:
            return None
        done += count
    return data


_OLD = b"l\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled number that torch before 1.6 begins a file with
_AGAIN = "not the file itself: fetch the file again"
_STARTS = (  # first bytes, what such a file is
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself: fetch it with git lfs pull"),
    (b"GGUF", "is a GGUF file: give the model that it was made from"),
    (b"\x1f\x8b", "is compressed with gzip: unpack it"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd: unpack it"),
    (b"<!doctype", f"is a web page, {_AGAIN}"),
    (b"<html", f"is a web page, {_AGAIN}"),
    (b"<?xml", f"is a page of XML, {_AGAIN}"),
)
_IN_PLACE = ((b"PK\3\4", "is a torch file"), (b"\x80", "is a pickle"))  # of a name that ends in .safetensors


def other_kind(start: bytes, path: Path, safe: bool = False) -> str | None:
    """Return what a file is that begins so, and what to do, if it is neither a torch file of today nor (safe) of safetensors."""
    if not start:
        return "is cut short, to no bytes: fetch or restore it"
    if safe and start[8:9] == b"{":
        return None  # whatever the bytes of the header's length look like
    if _OLD in start[:30] or start[257:262] == b"ustar":
        return (
            f"is in the format of torch before 1.6: convert it once with "
            f"python -c \"import torch; f = {str(path)!r}; torch.save(torch.load(f, 'cpu', weights_only=True), f)\""
        )
    plain = start.lstrip().lower()
    if found := next((what for first, what in _STARTS if start.startswith(first) or plain.startswith(first)), None):
        return found
    if safe and (found := next((what for first, what in _IN_PLACE if start.startswith(first)), None)):
        name = "adapter_model.bin" if path.name.startswith("adapter_model") else "pytorch_model.bin"
        return f"{found}, not of safetensors: give it the name {name}"
    if not safe and start[8:10] == b'{"':
        return "is a file of safetensors: give it a name that ends in .safetensors"
    if not safe and start[:1] == b"\x80":
        return (
            "is a pickle, but not of torch.save: load it where it was written, and save the state_dict with torch.save"
        )
    if len(start) < 300 and (text := _as_text(start)):
        return f"is a text ({text}), {_AGAIN}"
    return None


def _as_text(start: bytes) -> str:
    """Return the first words of a message that a server sent in place of a file."""
    text = start.decode("ascii", "replace").strip()
    return text[:60] if text.replace("\n", " ").isprintable() and "\ufffd" not in text else ""


def _text(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__

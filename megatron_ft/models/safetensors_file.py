"""Reads and writes safetensors one tensor at a time: a JSON header with names, types, shapes and offsets, then the data.

The safetensors library is not used, because it maps whole files, which count as memory of the process. The header is not trusted: sizes,
gaps, overlaps and the end of the file are checked before any tensor is read. Source: the format's README.
"""

from __future__ import annotations

import json
import os
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_ft.errors import CheckpointError
from megatron_ft.models.torch_file import other_kind, read_at

MAX_HEADER = 1 << 25  # bytes; a model of 100,000 tensors has a third of that, the format itself allows 100 MB
MAX_AXES = 8
KINDS = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in KINDS.items()}


class SafetensorsFile:
    """An opened file. Raise CheckpointError, naming it, for whatever does not fit."""

    def __init__(self, path: Path, remedy: str):
        self.path, self._remedy = Path(path), remedy
        self._handle = os.open(self.path, os.O_RDONLY)
        self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]] = {}
        """name -> (type, shape, first byte in the file, bytes)"""
        if other := other_kind(os.pread(self._handle, 300, 0), self.path, safe=True):
            raise CheckpointError(f"{self.path} {other}")
        try:
            self._read_header(os.path.getsize(self.path))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{self.path} is cut short or no safetensors file: {str(error)[:100]}; {remedy}"
            ) from error

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)

    def _read_header(self, size: int) -> None:
        length = int.from_bytes(os.pread(self._handle, 8, 0), "little")
        if size < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(os.pread(self._handle, length, 8).decode(), object_pairs_hook=_no_doubles)
        ends = []
        for name, entry in header.items():
            if name == "__metadata__":
                if not all(isinstance(text, str) for text in entry.values()):
                    raise ValueError("notes that are no text")
                continue
            if not isinstance(entry["shape"], list) or not isinstance(entry["data_offsets"], list):
                raise ValueError(f"{name}: sizes that are no sizes")
            dtype, shape, (start, end) = KINDS[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            if len(shape) > MAX_AXES or any(type(n) is not int or not 0 <= n < 1 << 62 for n in (*shape, start, end)):
                raise ValueError(f"{name}: sizes that are no sizes")
            if prod(shape) * dtype.itemsize != end - start:
                raise ValueError(f"{name}: {end - start} bytes for shape {list(shape)}")
            ends.append((start, end))
            self.tensors[name] = dtype, shape, 8 + length + start, end - start
        at = 0
        for start, end in sorted(ends):
            if start != at:
                raise ValueError("tensors overlap or leave a gap")
            at = end
        if 8 + length + at != size:
            raise ValueError(f"{8 + length + at} bytes described, {size} there")

    def read(self, name: str) -> Tensor:
        dtype, shape, start, size = self.tensors[name]
        data = read_at(self._handle, start, size)
        if data is None:
            raise CheckpointError(f"{self.path} became shorter while it was read; {self._remedy}")
        return data.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


def _no_doubles(pairs: list) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an entry occurs twice")
    return found


def header_of(tensors: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> tuple[bytes, list[int]]:
    """Return (the first bytes of the file, offset of each tensor's data); the file ends with the last tensor."""
    entries: dict = {"__metadata__": {"format": "pt"}}
    at, starts = 0, []
    for name, dtype, shape in tensors:
        size = prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        starts.append(at)
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text, [8 + len(text) + start for start in starts]

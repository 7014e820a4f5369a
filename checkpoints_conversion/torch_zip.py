"""torch.save's zip format, in which every byte's position is known before any tensor is available.

The size of a file follows from the shapes, so a plan has exact sizes. Tensors can be written in any order from several threads, one at a
time in memory. The files open with torch.load(weights_only=True), memory-mapped or not; CRCs are those of the data.
Source of the layout: torch/serialization.py, and the ZIP specification with its 64-bit extension.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import threading
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

ALIGNMENT = 64
_FULL = 0xFFFFFFFF  # the real number is in the 64-bit extension
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")


@dataclass(frozen=True)
class Slot:
    """A tensor that will be written later."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass
class _Record:
    name: bytes
    size: int
    offset: int  # of the local header
    data_offset: int
    crc: int = 0


class TorchZip:
    """The plan of one file. value: plain types and Slots. base: start of the archive in a larger file."""

    def __init__(self, value: Any, base: int = 0):
        pickled = io.BytesIO()
        pickler = _Pickler(pickled)
        pickler.dump(value)
        self.slots, self._base, self._lock = pickler.slots, base, threading.Lock()
        self._small = {"data.pkl": pickled.getvalue(), "byteorder": b"little"}
        self._records: list[_Record] = []
        self._at = 0
        for name, data in self._small.items():
            self._add(name, len(data))
        for number, slot in enumerate(self.slots):
            self._add(f"data/{number}", slot.nbytes)
        self._small["version"] = b"3\n"
        self._add("version", 2)
        self._directory = self._at
        self._at += sum(_CENTRAL.size + len(record.name) + 28 for record in self._records)
        self.size = self._at + 56 + 20 + 22

    def _add(self, name: str, size: int) -> None:
        encoded = b"archive/" + name.encode()
        start = self._at + _LOCAL.size + len(encoded) + 20 + 4
        data = start + -start % ALIGNMENT
        self._records.append(_Record(encoded, size, self._at, data))
        self._at = data + size

    def write(self, file: int, number: int, tensor: torch.Tensor) -> None:
        """Write the number-th slot's tensor to an open file. Threads may write different slots at once."""
        slot = self.slots[number]
        assert tensor.dtype == slot.dtype and tuple(tensor.shape) == slot.shape, (number, tensor.shape, slot)
        data = as_bytes(tensor)
        record = self._records[2 + number]
        record.crc = zlib.crc32(data)
        write_at(file, data, self._base + record.data_offset)

    def finish(self, file: int) -> None:
        """Write the headers and the directory, after every slot has been written."""
        for name, data in self._small.items():
            record = next(r for r in self._records if r.name == b"archive/" + name.encode())
            record.crc = zlib.crc32(data)
            write_at(file, data, self._base + record.data_offset)
        for record in self._records:
            write_at(file, self._local(record), self._base + record.offset)
        directory = b"".join(self._central(record) for record in self._records)
        count, end = len(self._records), self._directory + len(directory)
        tail = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), self._directory)
        tail += struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
        few = min(count, 0xFFFF)
        tail += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, few, few, _FULL, _FULL, 0)
        write_at(file, directory + tail, self._base + self._directory)

    @staticmethod
    def _local(record: _Record) -> bytes:
        padding = record.data_offset - record.offset - _LOCAL.size - len(record.name) - 24
        extra = struct.pack("<2H2Q2H", 1, 16, record.size, record.size, 0x4246, padding) + b"Z" * padding
        fixed = _LOCAL.pack(b"PK\3\4", 45, 0, 0, 0, 0, record.crc, _FULL, _FULL, len(record.name), len(extra))
        return fixed + record.name + extra

    @staticmethod
    def _central(record: _Record) -> bytes:
        extra = struct.pack("<2H3Q", 1, 24, record.size, record.size, record.offset)
        name = record.name
        fixed = _CENTRAL.pack(
            b"PK\1\2", 45, 45, 0, 0, 0, 0, record.crc, _FULL, _FULL, len(name), len(extra), 0, 0, 0, 0, _FULL
        )
        return fixed + name + extra


class _Storage:
    def __init__(self, number: int, slot: Slot):
        self.number, self.slot = number, slot


class _Pickler(pickle.Pickler):
    """Pickles a tensor as torch.save does, from its shape only."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file, protocol=2)
        self.slots: list[Slot] = []

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        return ("storage", _STORAGES[value.slot.dtype], str(value.number), "cpu", prod(value.slot.shape))

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Slot):
            return NotImplemented
        self.slots.append(value)
        strides = tuple(prod(value.shape[i + 1 :]) for i in range(len(value.shape)))
        storage = _Storage(len(self.slots) - 1, value)
        return torch._utils._rebuild_tensor_v2, (storage, 0, value.shape, strides, False, OrderedDict())


_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.uint8: torch.ByteStorage,
}


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes in row-major order, without a copy if it is contiguous."""
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def write_at(file: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        done = os.pwrite(file, view[: 1 << 30], offset)
        view, offset = view[done:], offset + done

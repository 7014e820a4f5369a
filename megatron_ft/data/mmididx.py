"""Megatron's indexed dataset (MMIDIDX): sequences of numbers in a .bin file, their lengths and places in a .idx file.

The .idx file, little-endian: 9 bytes "MMIDIDX\\0\\0", u64 version 1, u8 dtype code, u64 number of sequences N, u64
number of document entries M, int32 lengths[N], int64 byte offsets[N], int64 documents[M] (the sequence each document
starts at, then N). The .bin file: the numbers alone. Megatron-LM, Megatron-LLM and megatron-core's IndexedDataset
read it.

Reading never maps the .bin file: a file cut short while it is mapped kills the process, while a short read is an
error with a name. Knows nothing of tokens and roles.
"""

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO

import numpy as np

from megatron_ft.data.fingerprint import fingerprint, fingerprint_of_file
from megatron_ft.errors import DataError
from megatron_ft.wording import counted

MAGIC = b"MMIDIDX\x00\x00"
OLD_MAGIC = b"TNTIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
# Codes 6 and 7 (floats) differ between forks of Megatron and never occur in tokens.
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
REMEDY = "it is damaged or cut short: run pretokenize again, or copy the whole file again"
OTHER_BYTES = "its bytes are not those that were written; copy it again, or run pretokenize again"


def write_index(file: IO[bytes], lengths: np.ndarray, dtype: np.dtype) -> None:
    """Write the .idx of sequences that lie one after another, each its own document. lengths: [N], not in bytes."""
    count = len(lengths)
    offsets = (np.cumsum(lengths, dtype=np.int64) - lengths) * dtype.itemsize
    file.write(HEADER.pack(MAGIC, 1, CODES[dtype], count, count + 1))
    for array, kind in ((lengths, "<i4"), (offsets, "<i8"), (np.arange(count + 1), "<i8")):
        file.write(np.asarray(array).astype(kind).tobytes())


def read_index(path: Path, digest: str | None = None) -> tuple[np.dtype, np.ndarray]:
    """Return the dtype and the lengths (int32 [N]) of a .idx file.

    digest: of the whole file, if known. Raise DataError with the file if a number in it is not what write_index writes for these lengths.
    """
    data = _read_all(path)
    if digest is not None and fingerprint(data) != digest:
        raise DataError(f"{path}: {OTHER_BYTES}")
    return parse_index(data, path)


def parse_index(data: bytes, path: Path) -> tuple[np.dtype, np.ndarray]:
    """Return the same from the content of a file."""
    dtype, lengths, starts = _parse(data, path, shortest=1)
    if len(starts) != len(lengths) + 1:
        raise DataError(
            f"{path}: {counted(len(lengths), 'sequence')} and {counted(len(starts), 'document')} do not fit; {REMEDY}"
        )
    _compare(path, "document", starts, np.arange(len(lengths) + 1))
    return dtype, lengths.copy()  # a view would keep the five times as large file in memory


def read_foreign_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """Return the same of another tool's file: sequences may be empty, documents may have several or none, or may never be ended.

    The third array is the document index, int64: [0] where documents were never ended.
    """
    dtype, lengths, starts = _parse(_read_all(path), path, shortest=0)
    if not len(starts) or starts[0] != 0 or (np.diff(starts) < 0).any() or starts[-1] > len(lengths):
        raise DataError(f"{path}: its document index is not one of {len(lengths)} sequences; {REMEDY}")
    return dtype, lengths.copy(), starts.copy()


def _parse(data: bytes, path: Path, shortest: int) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """Return dtype, lengths and document index. Memory is allocated only after the size of the file was checked."""
    if data[:8] == OLD_MAGIC:
        raise DataError(
            f"{path}: fairseq's older format (TNTIDX), of dataset_impl lazy and cached, is not read; write it with dataset_impl mmap"
        )
    if len(data) < HEADER.size or data[:9] != MAGIC:
        raise DataError(f"{path}: not a Megatron index; {REMEDY}")
    _, version, code, count, documents = HEADER.unpack_from(data)
    if version != 1 or code not in DTYPES:
        raise DataError(f"{path}: version {version} and number type {code} are unknown; {REMEDY}")
    if len(data) != HEADER.size + 12 * count + 8 * documents:
        raise DataError(
            f"{path}: {counted(len(data), 'byte')} do not fit {counted(count, 'sequence')} and {counted(documents, 'document')}; {REMEDY}"
        )
    dtype = np.dtype(DTYPES[code])
    lengths = np.frombuffer(data, "<i4", count, HEADER.size)
    offsets = np.frombuffer(data, "<i8", count, HEADER.size + 4 * count)
    if (short := lengths < shortest).any():
        raise DataError(f"{path}: sequence {np.argmax(short)} has length {lengths[np.argmax(short)]}; {REMEDY}")
    _compare(path, "offset", offsets, (np.cumsum(lengths, dtype=np.int64) - lengths) * dtype.itemsize)
    return dtype, lengths, np.frombuffer(data, "<i8", documents, HEADER.size + 12 * count)


def _compare(path: Path, what: str, got: np.ndarray, expected: np.ndarray) -> None:
    if (got != expected).any():
        where = int(np.argmax(got != expected))
        raise DataError(f"{path}: {what} {where} is {got[where]}, expected {expected[where]}; {REMEDY}")


class Sequences:
    """The sequences of PREFIX.bin and PREFIX.idx. Threads and forked processes may share it: reads keep no position.

    digests: ".bin" and ".idx" -> the files' fingerprints, where they are known. The index is compared with its own here, the
    numbers by verify(), and again where the file is written to while it is read. foreign: written by another tool.
    """

    def __init__(
        self, prefix: str | os.PathLike, digests: Mapping[str, str] = MappingProxyType({}), foreign: bool = False
    ) -> None:
        self.path, self.digest = Path(f"{prefix}.bin"), digests.get(".bin")
        if foreign:
            self.dtype, self.lengths, self.documents = read_foreign_index(Path(f"{prefix}.idx"))
        else:
            self.dtype, self.lengths = read_index(Path(f"{prefix}.idx"), digests.get(".idx"))
        self._offsets = np.cumsum(self.lengths, dtype=np.int64) - self.lengths
        expected = int(self.lengths.sum(dtype=np.int64)) * self.dtype.itemsize
        try:
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 - open as long as this object lives
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror}); {REMEDY}") from error
        status = os.fstat(self._file.fileno())
        self.bytes, self._written = status.st_size, status.st_mtime_ns
        if self.bytes != expected:
            raise DataError(f"{self.path}: {counted(self.bytes, 'byte')}, its index says {expected}; {REMEDY}")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return a copy of one sequence. Raise DataError if the file has changed since it was opened."""
        return self.read(int(self._offsets[index]), int(self.lengths[index]))

    def read(self, start: int, count: int) -> np.ndarray:
        """Return `count` numbers from number `start` on, across the bounds of sequences."""
        width, handle = self.dtype.itemsize, self._file.fileno()
        data = os.pread(handle, count * width, start * width)
        if len(data) != count * width:
            raise DataError(f"{self.path}: has become shorter while it was read; {REMEDY}")
        if (written := os.fstat(handle).st_mtime_ns) != self._written:
            self.verify("has been written to while it was read, and ")
            self._written = written  # only touched
        return np.frombuffer(data, self.dtype)

    def verify(self, before: str = "") -> None:
        """Read the whole .bin file and raise DataError where its bytes are not those of the digest, if that is known."""
        if self.digest is not None and fingerprint_of_file(self._file.fileno()) != self.digest:
            raise DataError(f"{self.path}: {before}{OTHER_BYTES}")


def _read_all(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from error

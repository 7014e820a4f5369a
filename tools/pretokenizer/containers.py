"""Compressed and packed files: gzip, zstd, xz, bzip2, tar. Opens a file and yields the plain streams in it.

The type of a file is determined by its first bytes, never by its name: some files called .tar.gz are gzipped text. Nothing is unpacked
to disk, and streams are read only as far as needed.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megatron_ft.errors import DataError

ZSTD = b"\x28\xb5\x2f\xfd"
STANDARD: dict[bytes, Any] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
    b"\xfd7zXZ\0": lzma.LZMAFile,
    **{b"BZh%d1AY&SY" % level: bz2.BZ2File for level in range(1, 10)},
}
"""What Python's own library unpacks, by how it begins."""
MEMBERS = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".tar", ".tgz", ".zip")
"""Members of an archive that are data, or are refused with advice; all others are ignored."""
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
FOREIGN = {
    b"PK\x03\x04": "a zip archive (or a spreadsheet, which is one); unpack it and give the files in it, a spreadsheet saved as CSV",
    b"7z\xbc\xaf": "a 7z archive; unpack it and give the files in it",
    b"Rar!": "a RAR archive; unpack it and give the files in it",
    b"\xd0\xcf\x11\xe0": "an old spreadsheet or document; save it as CSV",
    b"%PDF": "a PDF; write its text as JSON lines",
    b"SQLite format 3": "an SQLite database; export a table as CSV or JSON lines",
    b"\x89HDF": "an HDF5 file; export it as JSON lines or Parquet",
    b"\x93NUMPY": "a NumPy array; give the chats as JSON lines",
    b"ORC": "an ORC table; convert it to Parquet",
    b"Obj\x01": "an Avro file; convert it to JSON lines or Parquet",
    b"\x04\x22\x4d\x18": "packed with lz4; unpack it with lz4 -d",
    b"\xff\x06\x00\x00sNaPpY": "packed with snappy; unpack it",
    b"\x89LZO": "packed with lzop; unpack it with lzop -d",
    b"\x1f\x9d": "packed with compress; unpack it with uncompress",
    b"\x5d\x00\x00": "packed with lzma; unpack it with xz -d --format=lzma",
    b"version https://git-lfs": "a pointer of Git LFS in place of the file; fetch the file with git lfs pull",
    b"<!doctype html": "a web page, not the file behind it; download the file itself",
    b"<html": "a web page, not the file behind it; download the file itself",
    b"\xff\xfe": "text in UTF-16; save it as UTF-8",
    b"\xfe\xff": "text in UTF-16; save it as UTF-8",
}
"""Files of other kinds by how they begin: what they are, and what to do. Pickles are in _foreign, by their first bytes."""
_ZSTD_BYTES = 1 << 12  # read at once; what they become, at most 32,000 times as much, is in memory
DEEPEST = 4  # largest depth of nested compression, a limit against malicious files

Stream = tuple[str, io.BufferedReader]  # its name in messages; a stream at its start, for its peek()


def optional(name: str, purpose: str) -> Any:
    """Import an optional library. Raise DataError with the install command if it is missing."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise DataError(
            f"{purpose} needs {package}, which is not installed; pip install 'megatron_ft[data]' (or {package})"
        ) from error


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Convert errors while reading a file's streams to a DataError with the file's name."""
    zstd_error = _zstd_error()
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, zstd_error) as error:
        raise DataError(f"{path}: damaged archive ({error}); copy or download it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error


def streams(path: Path) -> Iterator[Stream]:
    """Yield the plain streams of a file, one after another; use it inside readable(path). Raise DataError for archive members that
    are links or have a path outside the archive."""
    with path.open("rb") as file:
        yield from _unwrap(file, str(path), 0)


def start_of(stream: io.BufferedReader, count: int) -> bytes:
    """Return the first bytes of an unread stream without advancing it."""
    return stream.peek(count)[:count]


def _unwrap(file: io.BufferedReader, name: str, depth: int) -> Iterator[Stream]:
    start = start_of(file, 512)
    if depth > DEEPEST:
        raise DataError(f"{name}: compressed {depth} times in a row; unpack it and give the data file")
    packed = next((unpack for mark, unpack in STANDARD.items() if start.startswith(mark)), None)
    if packed is not None:
        yield from _unwrap(io.BufferedReader(packed(file)), name, depth + 1)
    elif start[:4] == ZSTD:
        zstandard = optional("zstandard", f"{name}: reading zstd")
        yield from _unwrap(io.BufferedReader(_Zstd(file, zstandard.ZstdDecompressor())), name, depth + 1)
    elif start[257:262] == b"ustar":
        yield from _archive(file, name, depth)
    else:
        _refuse_foreign(start, name)
        yield name, file


class _Zstd(io.RawIOBase):
    """The frames of a zstd file, one after another. Raises EOFError if the last one is cut, of which the library's own stream reader
    says nothing."""

    def __init__(self, file: IO[bytes], decompressor: Any):
        self._file, self._decompressor = file, decompressor
        self._frame: Any = None
        self._ready, self._packed = memoryview(b""), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._file.read(_ZSTD_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends within a zstd frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._ready = memoryview(self._frame.decompress(self._packed))
            self._packed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _refuse_foreign(start: bytes, name: str) -> None:
    """Raise DataError for a file of a kind that holds no chats we can read, with what it is and what to do."""
    plain = start.lstrip().lower()
    found = next((what for mark, what in FOREIGN.items() if start.startswith(mark) or plain.startswith(mark)), None)
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        found = "a pickle, which is never opened because it can run code; write the chats as JSON lines"
    if found:
        raise DataError(f"{name}: {found}")


def _archive(file: IO[bytes], name: str, depth: int) -> Iterator[Stream]:
    found, others = False, list[str]()
    with tarfile.open(fileobj=file, mode="r|") as archive:
        for member in archive:
            where = f"{name}, member {member.name}"
            if member.isdir():
                continue
            if not member.isreg() or member.name.startswith("/") or ".." in Path(member.name).parts:
                raise DataError(f"{where}: a link, a device or a path outside the archive; pack the plain data file")
            if Path(member.name).name.startswith("."):
                continue  # added by macOS
            if _is_member(member.name):
                content = archive.extractfile(member)
                assert content is not None
                found = True
                yield from _unwrap(io.BufferedReader(content), where, depth + 1)  # type: ignore[arg-type]
            elif len(others) < 3:
                others.append(member.name)
    if not found:
        inside = f" (it holds {', '.join(others)})" if others else ""
        raise DataError(f"{name}: no .jsonl file in this archive{inside}; pack the data as JSON lines")


def _is_member(name: str) -> bool:
    name = name.lower()
    return name.removesuffix(next((end for end in COMPRESSED if name.endswith(end)), "")).endswith(MEMBERS)


def _zstd_error() -> type[BaseException]:
    try:
        import zstandard
    except ImportError:
        return EOFError
    return zstandard.ZstdError

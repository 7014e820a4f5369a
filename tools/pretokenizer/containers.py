"""Compressed and packed files: gzip, zstd, tar. Opens a file and yields the plain streams in it.

The type of a file is determined by its first bytes, never by its name: some files called .tar.gz are gzipped text. Nothing is unpacked
to disk, and streams are read only as far as needed.
"""

import contextlib
import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megatron_ft.errors import DataError

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
MEMBERS = (".jsonl", ".json", ".ndjson", ".txt")  # members of an archive that are read; all others are ignored
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
    except OSError as error:  # BadGzipFile is one too
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except (EOFError, zlib.error, tarfile.TarError, zstd_error) as error:
        raise DataError(f"{path}: damaged archive ({error}); copy or download it again") from error


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
    if start[:2] == GZIP:
        yield from _unwrap(io.BufferedReader(gzip.GzipFile(fileobj=file, mode="rb")), name, depth + 1)
    elif start[:4] == ZSTD:
        zstandard = optional("zstandard", f"{name}: reading zstd")
        plain = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        yield from _unwrap(io.BufferedReader(plain), name, depth + 1)
    elif start[257:262] == b"ustar":
        yield from _archive(file, name, depth)
    else:
        yield name, file


def _archive(file: IO[bytes], name: str, depth: int) -> Iterator[Stream]:
    found = False
    with tarfile.open(fileobj=file, mode="r|") as archive:
        for member in archive:
            where = f"{name}, member {member.name}"
            if member.isdir():
                continue
            if not member.isreg() or member.name.startswith("/") or ".." in Path(member.name).parts:
                raise DataError(f"{where}: a link, a device or a path outside the archive; pack the plain data file")
            if Path(member.name).name.startswith("."):
                continue  # added by macOS
            if member.name.removesuffix(".gz").removesuffix(".zst").endswith(MEMBERS):
                content = archive.extractfile(member)
                assert content is not None
                found = True
                yield from _unwrap(io.BufferedReader(content), where, depth + 1)  # type: ignore[arg-type]
    if not found:
        raise DataError(f"{name}: no .jsonl file in this archive; pack the data as JSON lines")


def _zstd_error() -> type[BaseException]:
    try:
        import zstandard
    except ImportError:
        return EOFError
    return zstandard.ZstdError

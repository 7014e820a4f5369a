"""Records of a data file, one after another, in constant memory: JSON lines, plain, gzipped or in a tar archive, and
JSON arrays.

What a file is, is told by its first bytes, never by its name: archives called .tar.gz are sometimes gzipped text.
Nothing is unpacked to the disk. A fault in the data names the file and the line.
"""

import gzip
import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megatron_ft.errors import DataError

MAX_LINE = 256 << 20  # bytes; a longer line is no conversation but a broken file

Record = tuple[str, dict[str, Any]]  # where it stands, for messages; its content


def records(path: Path) -> Iterator[Record]:
    """The JSON objects in a file. Raises DataError: unreadable file or archive, bad UTF-8, bad JSON, anything but
    objects."""
    try:
        with path.open("rb") as file:
            yield from _records(file, str(path))
    except OSError as error:  # BadGzipFile is one too
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except (EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{path}: damaged archive ({error}); copy or download it again") from error


def _records(file: IO[bytes], name: str) -> Iterator[Record]:
    start = _peek(file, 265)
    if start[:2] == b"\x1f\x8b":
        with gzip.open(file) as inner:
            yield from _records(inner, name)  # type: ignore[arg-type]
    elif start[257:262] == b"ustar":
        yield from _archive(file, name)
    elif start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        yield from _array(file, name)
    else:
        yield from _lines(file, name)


def _peek(file: IO[bytes], count: int) -> bytes:
    start = file.read(count)
    file.seek(0)
    return start


def _archive(file: IO[bytes], name: str) -> Iterator[Record]:
    found = False
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            where = f"{name}, member {member.name}"
            if member.isdir():
                continue
            if not member.isreg() or member.name.startswith("/") or ".." in Path(member.name).parts:
                raise DataError(f"{where}: a link, a device or a path out of the archive; pack the plain data file")
            if member.name.endswith((".jsonl", ".json", ".jsonl.gz", ".json.gz")):
                content = archive.extractfile(member)
                assert content is not None
                found = True
                yield from _records(content, where)
    if not found:
        raise DataError(f"{name}: no .jsonl file in this archive; pack the data as JSON lines")


def _array(file: IO[bytes], name: str) -> Iterator[Record]:
    try:
        entries = json.loads(file.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{name}, line {error.lineno}: not valid JSON ({error.msg}); repair the line") from error
    except RecursionError as error:
        raise DataError(f"{name}: nested too deeply; this is no chat data") from error
    for number, entry in enumerate(entries, 1):
        yield _object(entry, f"{name}, entry {number}")


def _lines(file: IO[bytes], name: str) -> Iterator[Record]:
    import orjson

    number = 0
    while line := file.readline(MAX_LINE):
        number += 1
        where = f"{name}, line {number}"
        if len(line) == MAX_LINE:
            raise DataError(f"{where}: longer than {MAX_LINE >> 20} MiB; write one JSON object a line")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from error
        if not text.strip():
            continue
        try:
            entry = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise DataError(f"{where}: not valid JSON ({error.msg}); repair or remove the line") from error
        yield _object(entry, where)


def _object(entry: Any, where: str) -> Record:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: a JSON {type(entry).__name__} where an object was expected; write one chat a line")
    return where, entry

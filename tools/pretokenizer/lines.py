"""Records of a data file in constant memory: JSON lines, JSON arrays, CSV, Parquet and Arrow tables, plain text.

A file is read in chunks, which are sent to other processes and parsed there. The same file always gives the same chunks. Errors in the
data have the file's name and the line. containers.py opens compressed files, readers.py interprets the records.
"""

import codecs
import contextlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megatron_ft.errors import DataError, kind_of
from tools.pretokenizer import tables
from tools.pretokenizer.chunk import MAX_LINE, ROWS, Chunk, Faulty
from tools.pretokenizer.containers import COMPRESSED, readable, start_of, streams

CHUNK = 1 << 19  # approximate bytes of lines

Record = tuple[str, dict[str, Any]]  # its location, for messages; its content


def chunks(path: Path) -> Iterator[Chunk]:
    """Yield the chunks of a file. Raise DataError if it cannot be read."""
    with readable(path):
        for name, stream in streams(path):
            yield from _chunks(path, name, stream)


def _chunks(path: Path, name: str, stream: io.BufferedReader) -> Iterator[Chunk]:
    start = start_of(stream, 64)
    plain = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    ending = _ending(name.split(", member ")[-1].lower())
    if start[:4] == b"PAR1":
        yield from tables.parquet(path, name)
    elif start[:6] == b"ARROW1" or start[:4] == b"\xff\xff\xff\xff":
        yield from tables.arrow(path, name)
    elif plain == b"[" and not _is_list_line(stream):
        yield from _array(stream, name)
    elif plain != b"{" and ending == ".txt":
        yield _document(stream, name)
    elif plain != b"{" and ending in tables.DELIMITED:
        yield from tables.delimited(stream, name, ending)
    else:
        yield from _lines(stream, name)


def _ending(name: str) -> str:
    """Return the ending of a file's name without that of its compression."""
    return Path(name.removesuffix(next((end for end in COMPRESSED if name.endswith(end)), ""))).suffix


def _is_list_line(stream: io.BufferedReader) -> bool:
    """Return whether a file that begins with a list has lines: the list ends on its first line, and others follow."""
    line, _, rest = start_of(stream, 1 << 13).partition(b"\n")
    if not line.rstrip().endswith(b"]") or not rest.strip():
        return False
    with contextlib.suppress(ValueError, RecursionError):
        return isinstance(json.loads(line), list)
    return False


def records(path: Path, bad: list[str] | None = None) -> Iterator[Record]:
    """Yield the JSON objects of a file. Raise DataError for an unreadable file or archive, invalid UTF-8, invalid JSON, and values
    that are not objects. bad: takes the messages of faulty records instead."""
    for chunk in chunks(path):
        yield from parse(chunk, bad)


def parse(chunk: Chunk, bad: list[str] | None = None) -> Iterator[Record]:
    """Yield the records of a chunk. For a faulty one raise DataError, or append its message to `bad` and continue."""
    exact = chunk.lines is not None and any(key in chunk.lines for key in _OF_TOOLS)
    numbered = enumerate(chunk.rows or [] if chunk.lines is None else chunk.lines.split(b"\n"), chunk.first)
    for number, entry in numbered:
        if chunk.lines is not None and len(entry) < MAX_LINE and not entry.strip():
            continue
        where = f"{chunk.name}, {chunk.unit} {number}"
        try:
            content = entry if chunk.lines is None else _loads(entry, where, exact)
            if isinstance(content, Faulty):
                raise DataError(content if content.startswith(chunk.name) else f"{where}: {content}")
            if not isinstance(content, dict):
                raise DataError(f"{where}: {kind_of(content)}, an object was expected; write one chat per line")
        except DataError as error:
            if bad is None:
                raise
            bad.append(str(error))
            continue
        yield where, content


def _loads(line: bytes, where: str, exact: bool) -> Any:
    """Return the JSON of a line. exact: integers of more than 64 bits, which orjson rounds, stay what they are."""
    import orjson

    if len(line) >= MAX_LINE:
        raise DataError(f"{where}: longer than {MAX_LINE >> 20} MiB; write one JSON object per line")
    try:
        value = orjson.loads(line)
        return json.loads(line) if exact and _LONG.search(line) else value
    except orjson.JSONDecodeError as error:
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as wrong:
            raise DataError(f"{where}: byte {wrong.start + 1} is not UTF-8; save the file as UTF-8") from wrong
        if line.strip() == b"{":
            raise DataError(f"{where}: an object over several lines; write one chat per line: jq -c . FILE") from error
        raise DataError(f"{where}: not valid JSON ({error.msg}); repair or remove the line") from error


_LONG, _OF_TOOLS = re.compile(rb"\d{19}"), (b'"arguments"', b'"parameters"', b'"function"')


def _lines(stream: IO[bytes], name: str) -> Iterator[Chunk]:
    first = 1
    while data := stream.read(CHUNK):
        whole = data.endswith(b"\n")
        if not whole:
            rest = stream.readline(MAX_LINE)
            data, whole = data + rest, len(rest) < MAX_LINE or rest.endswith(b"\n")
        if first == 1:
            data = data.removeprefix(b"\xef\xbb\xbf")
        yield Chunk(name, "line", first, data, None)  # a line that is too long is refused or skipped when it is parsed
        first += data.count(b"\n")
        while not whole:
            rest = stream.readline(CHUNK)
            whole = not rest or rest.endswith(b"\n")
            first += rest.endswith(b"\n")


def _array(stream: IO[bytes], name: str) -> Iterator[Chunk]:
    first, rows = 1, []
    for entry in _elements(stream, name):
        rows.append(entry)
        if len(rows) == ROWS:
            yield Chunk(name, "entry", first, None, rows)
            first, rows = first + len(rows), []
    if rows:
        yield Chunk(name, "entry", first, None, rows)


def _elements(stream: IO[bytes], name: str) -> Iterator[Any]:
    """Yield the elements of a JSON array that may be larger than memory."""
    text, at, line, step = "", 0, 1, CHUNK
    decoder, decode = codecs.getincrementaldecoder("utf-8-sig")(), json.JSONDecoder().raw_decode
    ended, wanted, read = False, "[", 0
    while True:
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        if at < len(text) and wanted:
            if text[at] == "]" and wanted != "[":
                return
            if text[at] not in wanted:
                raise _broken(name, line + text.count("\n", 0, at), f"expecting {' or '.join(wanted)}")
            at, wanted = at + 1, ""
            continue
        if at < len(text):
            if text[at] == "]" and text[:at].rstrip().endswith("["):
                return  # an empty array
            try:
                entry, end = decode(text, at)
                if end < len(text) or ended:  # a number at the end may continue
                    yield entry
                    at, wanted, step = end, ",]", CHUNK
                    continue
            except RecursionError as error:
                raise DataError(f"{name}: nested too deeply; this is not chat data") from error
            except json.JSONDecodeError as error:
                # If more data may follow, only an error well before the end of the text is final.
                if ended or (error.pos < len(text) - 4096 and not error.msg.startswith("Unterminated")):
                    raise _broken(name, line + text.count("\n", 0, error.pos), error.msg) from error
            if len(text) - at > MAX_LINE:
                raise _broken(name, line, f"an entry longer than {MAX_LINE >> 20} MiB")
            step *= 2  # not quadratic on long entries
        elif ended:
            raise _broken(name, line + text.count("\n"), "the array is not closed")
        line += text.count("\n", 0, max(at - 1, 0))
        text, at = text[max(at - 1, 0) :], min(at, 1)
        data = stream.read(step)
        ended, read = len(data) < step, read + len(data)
        try:
            text += decoder.decode(data, final=ended)
        except UnicodeDecodeError as error:
            raise DataError(f"{name}: byte {read - len(data) + error.start} is not UTF-8; save as UTF-8") from error


def _broken(name: str, line: int, reason: str) -> DataError:
    return DataError(f"{name}, line {line}: not valid JSON ({reason}); repair the line")


def _document(stream: IO[bytes], name: str) -> Chunk:
    data = stream.read(MAX_LINE)
    if len(data) == MAX_LINE:
        raise DataError(f"{name}: a text longer than {MAX_LINE >> 20} MiB; cut it into several files")
    try:
        return Chunk(name, "document", 1, None, [{"text": data.decode("utf-8-sig")}])
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: byte {error.start} is not UTF-8; save the file as UTF-8") from error

"""Tables: Parquet, Arrow, CSV. A row is a record, with the columns as its keys.

Arrow gives every object of a column the same keys, and null where a row did not have one. Such keys are removed again, at every depth, so
that a table has the records of the JSON lines it was made of. (A null that was in the JSON lines cannot be told from them.) An empty cell
of CSV is absent in the same way, and a cell that is a JSON list of messages is that list.
"""

import contextlib
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_ft.errors import DataError
from tools.pretokenizer.chunk import MAX_LINE, ROWS, Chunk, Faulty
from tools.pretokenizer.containers import optional, start_of

DELIMITED = {".csv": ",;\t|", ".tsv": "\t"}
"""Endings of files with one row per line, and what may stand between their cells."""


def parquet(path: Path, name: str) -> Iterator[Chunk]:
    if name != str(path):
        raise DataError(f"{name}: a Parquet file inside another; unpack it and give the Parquet file itself")
    library = optional("pyarrow.parquet", f"{name}: reading Parquet")
    yield from _tables(lambda: library.ParquetFile(path).iter_batches(batch_size=ROWS), name)


def arrow(path: Path, name: str) -> Iterator[Chunk]:
    if name != str(path):
        raise DataError(f"{name}: an Arrow file inside another file; unpack it and give the Arrow file")
    ipc = optional("pyarrow.ipc", f"{name}: reading Arrow")

    def batches() -> Iterator[Any]:
        with path.open("rb") as file:
            if file.read(6) == b"ARROW1":
                reader = ipc.open_file(path)
                yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                file.seek(0)
                yield from ipc.open_stream(file)

    yield from _tables(batches, name)


def without_nulls(value: Any) -> Any:
    """Return a row's value without the keys that are null."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        if value and all(isinstance(item, tuple) for item in value):  # a column of Arrow's type map
            return {str(key): without_nulls(inner) for key, inner in value}
        return [without_nulls(item) for item in value]
    return value


def _tables(batches: Any, name: str) -> Iterator[Chunk]:
    pyarrow, first = optional("pyarrow", f"{name}: reading tables"), 1
    try:
        for batch in batches():
            for start in range(0, batch.num_rows, ROWS):
                rows = [without_nulls(row) for row in batch.slice(start, ROWS).to_pylist()]
                yield Chunk(name, "row", first, None, rows)
                first += len(rows)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{name}: damaged table ({' '.join(str(error).split())[:200]}); copy it again") from error


def delimited(stream: io.BufferedReader, name: str, ending: str) -> Iterator[Chunk]:
    """Yield the rows of a CSV file whose first row names the columns. A chunk's numbers are those of rows, the names' row being row 1."""
    rows = _rows(stream, _delimiter(stream, ending))
    names = next(rows, [])
    if isinstance(names, Faulty) or len(set(names)) < len(names):
        raise DataError(f"{name}, row 1: {names if isinstance(names, Faulty) else 'a column is named twice'}")
    first, found = 2, list[Any]()
    for row in rows:
        found.append(row if isinstance(row, Faulty) else _record(names, row))
        if len(found) == ROWS:
            yield Chunk(name, "row", first, None, found)
            first, found = first + len(found), []
    if found:
        yield Chunk(name, "row", first, None, found)


def _rows(stream: io.BufferedReader, delimiter: str) -> Iterator[list[str] | Faulty]:
    csv.field_size_limit(MAX_LINE)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield Faulty(f"not valid CSV ({error}); close the quotes, and write a quote inside quotes twice")
            continue
        if row is None:
            return
        if row:
            yield row


def _record(names: list[str], row: list[str]) -> dict[str, Any] | Faulty:
    if len(row) != len(names):
        return Faulty(
            f"has {len(row)} cells, the first row names {len(names)}; put quotes around text with a separator"
        )
    if any("\udc80" <= character <= "\udcff" for cell in row if not cell.isascii() for character in cell):
        return Faulty("holds bytes that are not UTF-8; save the file as UTF-8")
    return {name: _messages(cell) for name, cell in zip(names, row, strict=True) if cell}


def _messages(cell: str) -> Any:
    """Return the list of messages in a cell, or the cell."""
    if cell.lstrip().startswith("[{"):
        with contextlib.suppress(ValueError, RecursionError, AttributeError):
            found = json.loads(cell)
            if all({"role", "content"} <= item.keys() or {"from", "value"} <= item.keys() for item in found):
                return found
    return cell


def _delimiter(stream: io.BufferedReader, ending: str) -> str:
    """Return what separates the names in the first row: the character that it has most of."""
    header = start_of(stream, 4096).splitlines()[:1]
    return max(DELIMITED[ending], key=lambda one: header[0].count(one.encode()) if header else 0)

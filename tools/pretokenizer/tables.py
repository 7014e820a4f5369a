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
    if name != str(path) or _packed(path, b"PAR1"):
        raise DataError(f"{name}: a Parquet file inside another; unpack it and give the Parquet file itself")
    library = optional("pyarrow.parquet", f"{name}: reading Parquet")
    yield from _tables(lambda: library.ParquetFile(path).iter_batches(batch_size=ROWS), name)


def arrow(path: Path, name: str) -> Iterator[Chunk]:
    if name != str(path) or _packed(path, b"ARROW1", b"\xff\xff\xff\xff"):
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


def _packed(path: Path, *starts: bytes) -> bool:
    with path.open("rb") as file:
        return not file.read(8).startswith(starts)


def without_nulls(value: Any) -> Any:
    """Return a row's value without the keys that are null."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _with_maps(value: Any, kind: Any, types: Any) -> Any:
    """Return a value of an Arrow type with objects for its maps, which pyarrow gives as lists of pairs."""
    if value is None:
        return None
    if types.is_map(kind):
        return {str(key): _with_maps(inner, kind.item_type, types) for key, inner in value}
    if types.is_struct(kind):
        return {field.name: _with_maps(value.get(field.name), field.type, types) for field in kind}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return [_with_maps(item, kind.value_type, types) for item in value]
    return value


def _rows_of(batch: Any, maps: bool, types: Any) -> list[dict[str, Any]]:
    rows = batch.to_pylist()
    if maps:
        rows = [{field.name: _with_maps(row[field.name], field.type, types) for field in batch.schema} for row in rows]
    return [without_nulls(row) for row in rows]


def _tables(batches: Any, name: str) -> Iterator[Chunk]:
    pyarrow, first = optional("pyarrow", f"{name}: reading tables"), 1
    types = optional("pyarrow.types", name)
    try:
        for batch in batches():
            _check_columns(batch.schema.names, name)
            maps = "map<" in str(batch.schema)
            for start in range(0, batch.num_rows, ROWS):
                rows = _rows_of(batch.slice(start, ROWS), maps, types)
                yield Chunk(name, "row", first, None, rows)
                first += len(rows)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise DataError(f"{name}: damaged table ({' '.join(str(error).split())[:200]}); copy it again") from error


def delimited(stream: io.BufferedReader, name: str, ending: str) -> Iterator[Chunk]:
    """Yield the rows of a CSV file whose first row names the columns. A chunk's numbers are those of rows, the names' row being row 1."""
    rows = _rows(stream, _delimiter(stream, ending))
    names = next(rows, [])
    if isinstance(names, Faulty):
        raise DataError(f"{name}, row 1: {names}")
    _check_columns(names, f"{name}, row 1")
    first, found = 2, list[Any]()
    for row in rows:
        found.append(row if isinstance(row, Faulty) else _record(names, row))
        if len(found) == ROWS:
            yield Chunk(name, "row", first, None, found)
            first, found = first + len(found), []
    if found:
        yield Chunk(name, "row", first, None, found)


def _check_columns(names: list[str], where: str) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{where}: a column is named twice, '{twice}'; rename one of them")


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

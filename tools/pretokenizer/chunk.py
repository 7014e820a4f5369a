"""A chunk of a data file: what is sent to other processes and parsed there."""

from typing import Any, NamedTuple

ROWS = 500  # parsed records per chunk
MAX_LINE = 256 << 20  # bytes; a longer line is not a conversation but a damaged file


class Faulty(str):
    """In place of a row: what is wrong with it, which is said when the chunk is parsed."""


class Chunk(NamedTuple):
    """A part of a file. lines: JSON lines, parsed later. rows: parsed objects, or other values in place of an object."""

    name: str
    unit: str  # unit of the numbers: line, entry, row, document
    first: int
    lines: bytes | None
    rows: list[Any] | None

"""Log-probabilities that `megatron-ft score` has not finished: a hidden folder beside the files that they become.

    .NAME-teacher.unfinished/about.json    what the numbers depend on, and the shards
                             rows.bin      as PREFIX-teacher.bin, written piece by piece
                             done-*        one for each process: number of a piece and digest of its rows, 16 bytes each
                             lock          held while a process of this machine writes

A run that was killed is continued in any layout. Pieces whose rows do not have the digest that was noted are computed again: so neither a
kill between two writes nor a lost page of a disk can be taken for a result.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_ft import files
from megatron_ft.data.pieces import Pieces
from megatron_ft.data.teacher_logits import UNKNOWN, are_alike, description_path, rows_path, write_description
from megatron_ft.errors import UserError

_ENTRY = np.dtype([("piece", "<u8"), ("digest", "<u8")])


def folder_of(prefix: str) -> Path:
    final = rows_path(prefix)
    return final.with_name(f".{final.stem}.unfinished")


class Unfinished:
    """The folder of a prefix, for the main rank. described: all that the description will have but the rows' digest."""

    def __init__(self, prefix: str, described: dict[str, Any], kind: np.dtype):
        self.prefix, self.folder, self.described, self.kind = prefix, folder_of(prefix), described, kind
        self.rows = self.folder / "rows.bin"
        self._lock: IO | None = None

    def begin(self, pieces: Pieces, places: np.ndarray) -> np.ndarray:
        """Make the folder, or take up one of an earlier run with the same description. Return the numbers of the pieces that are done.

        places: of each piece's first row. Raise UserError if another process writes there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.folder / "lock", self.prefix)
        if self._is_of_this_run():
            done = self._whole(pieces, places)
            self._reset(places[done], places[done] + pieces.size[done])
            return done
        self._clear()
        self.rows.touch()
        self._reset(np.empty(0, np.int64), np.empty(0, np.int64))
        files.write_json(self.folder / "about.json", self.described)
        return np.empty(0, np.int64)

    def _is_of_this_run(self) -> bool:
        about, size = self.folder / "about.json", int(self.described["tokens"]) * self.kind.itemsize
        try:
            if not are_alike(files.read_json(about), self.described):
                return False
        except (UserError, KeyError, TypeError, AttributeError):
            return False
        final = rows_path(self.prefix)
        if not self.rows.exists() and final.is_file() and not description_path(self.prefix).exists():
            os.replace(final, self.rows)  # killed between the last two steps of `finish`
        return self.rows.is_file() and self.rows.stat().st_size == size

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.unlink()

    def _whole(self, pieces: Pieces, places: np.ndarray) -> np.ndarray:
        """Return the pieces whose rows are as they were noted."""
        noted = [np.frombuffer(data[: len(data) // 16 * 16], _ENTRY) for data in _journals(self.folder)]
        entries = np.concatenate(noted) if noted else np.empty(0, _ENTRY)
        with open(self.rows, "rb") as file:
            found = {
                int(entry["piece"])
                for entry in entries
                if entry["piece"] < len(pieces) and self._has(file, pieces, places, entry)
            }
        return np.array(sorted(found), np.int64)

    def _has(self, file: IO, pieces: Pieces, places: np.ndarray, entry: Any) -> bool:
        piece = int(entry["piece"])
        data = os.pread(
            file.fileno(), int(pieces.size[piece]) * self.kind.itemsize, int(places[piece]) * self.kind.itemsize
        )
        return digest_of(data) == int(entry["digest"])

    def _reset(self, starts: np.ndarray, ends: np.ndarray) -> None:
        """Write rows without a distribution everywhere but from each start to its end."""
        order = np.argsort(starts, kind="stable")
        gaps = zip([0, *ends[order].tolist()], [*starts[order].tolist(), int(self.described["tokens"])], strict=True)
        with open(self.rows, "r+b") as file:
            for first, end in gaps:
                file.seek(first * self.kind.itemsize)
                _write_unknown(file, end - first, self.kind)

    def finish(self) -> None:
        """Give the rows their name, then write the description, which makes them valid, then remove the folder."""
        description_path(self.prefix).unlink(missing_ok=True)
        os.replace(self.rows, rows_path(self.prefix))
        write_description(self.prefix, self.described)
        self.discard()

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def close(self) -> None:
        if self._lock:
            self._lock.close()
            self._lock = None


class Journal:
    """Rows of pieces, and the note that they are there, of one process."""

    def __init__(self, rows: Path):
        self._rows = os.open(rows, os.O_WRONLY)
        self._notes = open(rows.with_name(f"done-{secrets.token_hex(8)}"), "xb", buffering=0)  # noqa: SIM115

    def write(self, piece: int, data: bytes, place: int) -> None:
        """Write a piece's rows at `place`, in bytes, and note them."""
        entry = np.array([(piece, digest_of(data))], _ENTRY)
        while data:
            count = os.pwrite(self._rows, data, place)
            data, place = data[count:], place + count
        self._notes.write(entry.tobytes())

    def close(self) -> None:
        os.fsync(self._rows)
        os.close(self._rows)
        self._notes.close()


def digest_of(data: bytes) -> int:
    import xxhash

    return xxhash.xxh3_64_intdigest(data)


def _journals(folder: Path) -> Sequence[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("done-*"))]


def _locked(path: Path, prefix: str) -> IO:
    """Return the open lock. The system releases it when its process ends for any reason."""
    file = open(path, "a+b")  # noqa: SIM115 - open for the whole run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            file.close()
            raise UserError(
                f"{prefix}: another megatron-ft score writes there: wait until it ends, or give another --output"
            ) from error
    return file  # also on file systems without locks


def _write_unknown(file: IO, tokens: int, kind: np.dtype) -> None:
    """Write rows without a distribution for so many tokens."""
    row = np.zeros(1, kind)
    row["tail"] = UNKNOWN
    each = max(1, (1 << 22) // kind.itemsize)
    for first in range(0, tokens, each):
        file.write(row.tobytes() * min(each, tokens - first))

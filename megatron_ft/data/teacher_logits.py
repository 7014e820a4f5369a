"""A teacher's stored log-probabilities beside shards: PREFIX-teacher.bin and PREFIX-teacher.json, written by `megatron-ft score`.

The file has a row for each token of the shards, in their order: the k most likely tokens at its place, given the tokens before it in its
sample, their log-probabilities (fp16), and the probability of all others together (fp32). Rows of tokens without a distribution (the first
of a sample, those that are cut) have the tail -1. The description is written last and has a digest of the rows, of the shards' tokens, and
of itself, and names everything that the numbers depend on. Uses only numpy.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ft import files
from megatron_ft.data.fingerprint import fingerprint, fingerprint_of_file
from megatron_ft.data.plain import PlainShards
from megatron_ft.data.shards import Shards
from megatron_ft.errors import DataError, UserError

FORMAT_VERSION = 1
UNKNOWN = -1.0
"""Tail of a row without a distribution."""
AGAIN = "score the shards again with megatron-ft score"


def rows_path(prefix: str | os.PathLike) -> Path:
    return Path(f"{prefix}-teacher.bin")


def description_path(prefix: str | os.PathLike) -> Path:
    return Path(f"{prefix}-teacher.json")


def row_type(top_k: int, vocab_size: int) -> np.dtype:
    """Return the type of a row, without padding: 4k + 4 bytes for vocabularies up to 65,536, else 6k + 4."""
    ids = "<u2" if vocab_size <= 1 << 16 else "<u4"
    return np.dtype([("ids", ids, (top_k,)), ("log_probs", "<f2", (top_k,)), ("tail", "<f4")])


def digest_of_tokens(shards: Any) -> str:
    """Return the digest of the shards' tokens: what their manifest has, for those of other tools that of their two files of tokens."""
    if isinstance(shards, Shards):
        return str(shards.manifest.files["-text.bin"]["digest"])
    text = shards.prefix if isinstance(shards, PlainShards) else f"{shards.prefix}-text"
    return fingerprint([files.digest(f"{text}{ending}") for ending in (".bin", ".idx")])


def starts_of(shards: Any) -> np.ndarray:
    """Return the row of each sample's first token, and the end: int64. A part of plain shards has the rows of the whole."""
    if isinstance(shards, PlainShards):
        return shards.starts
    return np.concatenate([[0], np.cumsum(shards.lengths, dtype=np.int64)])


def rows_of(shards: Any) -> int:
    """Return the number of rows: of tokens in the files."""
    return shards.tokens_in_file if isinstance(shards, PlainShards) else int(starts_of(shards)[-1])


class TeacherLogits:
    """Opened log-probabilities of a prefix. Raise DataError if they are missing or not what was written."""

    def __init__(self, prefix: str):
        self.prefix = prefix
        self.described = _read(description_path(prefix))
        self.top_k, self.tokens = int(self.described["top_k"]), int(self.described["tokens"])
        self.type = row_type(self.top_k, int(self.described["vocab_size"]))
        self._file = _open(rows_path(prefix), self.tokens * self.type.itemsize)
        self._starts: np.ndarray | None = None

    def check(self, shards: Any, vocab_size: int, seq_length: int, over_long: str, temperature: float) -> None:
        """Raise DataError unless these are numbers of the tokens of `shards`, as a run with these settings reads them."""
        where, made = description_path(self.prefix), self.described
        if made["shards"] != digest_of_tokens(shards):
            raise DataError(f"{where} belongs to other shards than {shards.prefix}: give its own prefix, or {AGAIN}")
        wanted = {
            "vocab_size": vocab_size, "seq_length": seq_length, "over_long": over_long, "temperature": float(temperature),
        }  # fmt: skip
        for name, value in wanted.items():
            if made[name] != value:
                flag = {"vocab_size": "the model's vocabulary", "temperature": "--kd_temperature"}.get(
                    name, f"--{name}"
                )
                raise DataError(
                    f"{where}: made with {flag} {made[name]}, this run has {value}: use the same, or {AGAIN}"
                )
        self._starts = starts_of(shards)
        if rows_of(shards) != self.tokens:
            raise DataError(f"{where}: has {self.tokens} rows, the shards {rows_of(shards)} tokens; {AGAIN}")

    def rows(self, sample: int, first: int, count: int) -> np.ndarray:
        """Return the rows of tokens first .. first + count of a sample. Raise DataError if one has no distribution."""
        assert self._starts is not None, "check was not called"
        start = (int(self._starts[sample]) + first) * self.type.itemsize
        data = os.pread(self._file, count * self.type.itemsize, start)
        if len(data) != count * self.type.itemsize:
            raise DataError(f"{rows_path(self.prefix)}: ends within sample {sample}; copy it again, or {AGAIN}")
        found = np.frombuffer(data, self.type)
        if (found["tail"] < 0).any() or (found["ids"] >= self.described["vocab_size"]).any():
            raise DataError(f"{rows_path(self.prefix)}: sample {sample} was not scored as this run reads it; {AGAIN}")
        return found

    def verify(self) -> None:
        """Raise DataError unless the rows have the digest of those that were written."""
        if fingerprint_of_file(self._file) != self.described["digest"]:
            raise DataError(
                f"{rows_path(self.prefix)}: its bytes are not those that were written; copy it again, or {AGAIN}"
            )

    def record(self) -> dict[str, Any]:
        """Return what run.json says of it."""
        found = {"path": str(description_path(self.prefix).resolve()), "digest": self.described["digest"]}
        return found | {"teacher": self.described["teacher"]}

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("opened log-probabilities are not sent to other processes")


def is_finished(prefix: str, described: dict[str, Any]) -> bool:
    """Return whether the files of a prefix are whole, and of this description; the teacher may have moved."""
    try:
        stored = TeacherLogits(prefix)
        stored.verify()
    except DataError:
        return False
    made = {key: value for key, value in stored.described.items() if key != "digest"}
    return are_alike(made, described)


def are_alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two descriptions are of the same numbers: the teacher may have moved."""
    return _without_path(one) == _without_path(other)


def _without_path(described: dict[str, Any]) -> dict[str, Any]:
    return {**described, "teacher": {key: value for key, value in described["teacher"].items() if key != "path"}}


def write_description(prefix: str, described: dict[str, Any]) -> None:
    """Write PREFIX-teacher.json for finished rows; it makes them valid."""
    content = {**described, "digest": files.digest(rows_path(prefix))}
    files.write_json(
        description_path(prefix), {"format_version": FORMAT_VERSION, **content, "own_digest": fingerprint(content)}
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the prefix that megatron-ft score wrote, or {AGAIN}")
    try:
        content = files.read_json(path)
        version, own = content.pop("format_version"), content.pop("own_digest")
    except (UserError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: not a readable description ({' '.join(str(error).split())[:80]}); {AGAIN}") from error
    if version != FORMAT_VERSION:
        raise DataError(f"{path}: format version {version}, this megatron_ft reads {FORMAT_VERSION}; {AGAIN}")
    if own != fingerprint(content):
        raise DataError(f"{path}: has been changed since it was written; {AGAIN}")
    return content


def _open(path: Path, size: int) -> int:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({(error.strerror or str(error)).lower()}); {AGAIN}") from error
    if os.fstat(handle).st_size != size:
        raise DataError(f"{path}: {os.fstat(handle).st_size} bytes, written with {size}; copy it again, or {AGAIN}")
    return handle

"""Role-labelled shards: PREFIX-text.{bin,idx} with tokens, PREFIX-role.{bin,idx} with the role of every token,
PREFIX-manifest.json.

A sample is one conversation. Shards exist once their manifest does: it is written last and names every file's size
and hash, so that an interrupted run leaves nothing that opens. Knows nothing of chat formats; packing and mixing are
the loader's.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron_ft import files
from megatron_ft.data.manifest import AGAIN, Manifest, manifest_path, read_manifest, write_manifest
from megatron_ft.data.mmididx import Sequences, write_index
from megatron_ft.data.roles import ROLE_NAMES
from megatron_ft.errors import DataError

COPY = f"copy it again, or {AGAIN}"
ENDINGS = ("-text.bin", "-text.idx", "-role.bin", "-role.idx")


class ShardWriter:
    """Writes shards; a context manager. An error inside the block leaves what was there before.

    vocab_size: ids must be below it. tokenizer: Tokenizer.info(); chat_format: {name, stop_token}.
    """

    def __init__(
        self,
        prefix: str | os.PathLike,
        vocab_size: int,
        tokenizer: Mapping[str, Any] | None = None,
        chat_format: Mapping[str, Any] | None = None,
    ):
        self.prefix, self.vocab_size = str(prefix), vocab_size
        self.dtype = np.dtype(np.uint16 if vocab_size <= 65535 else np.int32)
        self.manifest = Manifest(
            tokenizer={"vocab_size": vocab_size, **(tokenizer or {})}, chat_format=dict(chat_format or {})
        )
        self._lengths: list[int] = []
        self._by_role = np.zeros(len(ROLE_NAMES), np.int64)

    def __enter__(self) -> "ShardWriter":
        with contextlib.ExitStack() as stack:
            self._files = {ending: stack.enter_context(files.atomic_file(self.prefix + ending)) for ending in ENDINGS}
            self._stack = stack.pop_all()
        return self

    def source(self, name: str, file: str, digest: str) -> None:
        """The samples added from here on come from this file."""
        self._close_source()
        self.manifest.sources.append({"name": name, "file": file, "digest": digest, "documents": [len(self._lengths)]})

    def add(self, ids: np.ndarray, roles: np.ndarray) -> None:
        """One sample: ids [tokens] below vocab_size, roles [tokens]. Raises DataError for anything else, no tokens
        included."""
        ids, roles = np.asarray(ids), np.asarray(roles)
        where = f"{self.prefix}: sample {len(self._lengths)}"
        if ids.ndim != 1 or ids.shape != roles.shape or not len(ids):
            raise DataError(f"{where} has ids {ids.shape} and roles {roles.shape}; give two equal shapes, [tokens]")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise DataError(
                f"{where} has ids {ids.min()} to {ids.max()}, the vocabulary {self.vocab_size}; another tokenizer?"
            )
        if roles.min() < 0 or roles.max() >= len(ROLE_NAMES):
            raise DataError(f"{where} holds a role outside 0..{len(ROLE_NAMES) - 1}; see roles.py")
        self._files["-text.bin"].write(ids.astype(self.dtype).tobytes())
        self._files["-role.bin"].write(roles.astype(np.uint8).tobytes())
        self._lengths.append(len(ids))
        self._by_role += np.bincount(roles, minlength=len(ROLE_NAMES))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            lengths = np.array(self._lengths, np.int64)
            write_index(self._files["-text.idx"], lengths, self.dtype)
            write_index(self._files["-role.idx"], lengths, np.dtype(np.uint8))
            # Older shards under this prefix end here: their manifest must not stand beside new files.
            manifest_path(self.prefix).unlink(missing_ok=True)
        self._close_source()
        self.manifest.counts = {
            "samples": len(self._lengths),
            "tokens": sum(self._lengths),
            "tokens_by_role": dict(zip(ROLE_NAMES, self._by_role.tolist(), strict=True)),
        }
        self.manifest.files = {ending: _describe(Path(self.prefix + ending)) for ending in ENDINGS}
        write_manifest(self.manifest, manifest_path(self.prefix))

    def _close_source(self) -> None:
        if self.manifest.sources:
            documents = self.manifest.sources[-1]["documents"]
            documents[1:] = [len(self._lengths)]


class Shards:
    """Opened shards; see open_shards. Can be sent to another process, which opens them anew."""

    def __init__(self, prefix: str | os.PathLike):
        self.prefix = str(prefix)
        self.manifest = read_manifest(self.prefix)
        for ending in ENDINGS:
            _check_file(self.prefix, ending, self.manifest)
        self._text, self._role = Sequences(self.prefix + "-text"), Sequences(self.prefix + "-role")
        self.lengths: np.ndarray = self._text.lengths  # int32 [samples], in tokens
        self.vocab_size: int = self.manifest.tokenizer["vocab_size"]
        if not np.array_equal(self.lengths, self._role.lengths) or self._role.dtype != np.uint8:
            raise DataError(f"{self.prefix}: text and role shards do not belong together; {AGAIN}")

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, index: int) -> np.ndarray:
        """The ids of a sample: uint16 or int32 [tokens]. Raises DataError for an id outside the vocabulary."""
        ids = self._text[index]
        if ids.max() >= self.vocab_size or ids.min() < 0:
            where = f"{self.prefix}-text.bin: sample {index}"
            raise DataError(f"{where} holds id {ids.max()}, outside the vocabulary of {self.vocab_size}; {AGAIN}")
        return ids

    def roles(self, index: int) -> np.ndarray:
        """The roles of a sample's tokens: uint8 [tokens]; see roles.py. Raises DataError for an unknown role."""
        roles = self._role[index]
        if roles.max() >= len(ROLE_NAMES):
            raise DataError(f"{self.prefix}-role.bin: sample {index} holds the unknown role {roles.max()}; {AGAIN}")
        return roles

    def __reduce__(self) -> tuple[Any, ...]:
        return Shards, (self.prefix,)


def open_shards(prefix: str | os.PathLike, verify: bool = False) -> Shards:
    """Open PREFIX's shards and check what is cheap: manifest, sizes, every number of the indexes, their hashes.

    verify: read the .bin files too and compare their hashes (gigabytes a second).
    Raises DataError naming the file and the remedy.
    """
    shards = Shards(prefix)
    if verify:
        for ending in ENDINGS:
            _check_digest(shards.prefix, ending, shards.manifest)
    return shards


def remove_shards(prefix: str | os.PathLike) -> None:
    """Remove a prefix's shards where there are any, the manifest first."""
    for path in (manifest_path(prefix), *(Path(f"{prefix}{ending}") for ending in ENDINGS)):
        path.unlink(missing_ok=True)


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "digest": files.digest(path)}


def _check_file(prefix: str, ending: str, manifest: Manifest) -> None:
    path = Path(prefix + ending)
    if not path.is_file():
        raise DataError(f"{path}: no such file, though the manifest names it; {AGAIN}")
    if path.stat().st_size != manifest.files[ending]["bytes"]:
        written = manifest.files[ending]["bytes"]
        raise DataError(f"{path}: {path.stat().st_size} bytes, written with {written}; {COPY}")
    if ending.endswith(".idx"):
        _check_digest(prefix, ending, manifest)


def _check_digest(prefix: str, ending: str, manifest: Manifest) -> None:
    if files.digest(prefix + ending) != manifest.files[ending]["digest"]:
        raise DataError(f"{prefix}{ending}: its bytes are not those that were written; {COPY}")

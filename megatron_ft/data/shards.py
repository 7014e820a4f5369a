"""Role-labelled shards: PREFIX-text.{bin,idx} with tokens, PREFIX-role.{bin,idx} with the role byte of every token,
PREFIX-manifest.json.

A sample is one conversation. A role byte contains the role and mark bits (mark, weight), see roles.py. The manifest is written last
and contains the size and hash of every file, so shards of an interrupted run cannot be opened. Chat formats, packing and mixing are
in other modules.
"""

import array
import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron_ft import files
from megatron_ft.data.manifest import AGAIN, FORMAT_VERSION, Manifest, manifest_path, read_manifest, write_manifest
from megatron_ft.data.mmididx import Sequences, write_index
from megatron_ft.data.roles import ALL_NAMES, MARKED, PART_NAMES, ROLE_BITS, ROLE_NAMES, WEIGHT_SHIFT, byte_weights
from megatron_ft.errors import DataError

COPY = f"copy it again, or {AGAIN}"
ENDINGS = ("-text.bin", "-text.idx", "-role.bin", "-role.idx")


class ShardWriter:
    """Writes shards; a context manager. An error inside the block leaves what was there before.

    vocab_size: ids must be below it. tokenizer: Tokenizer.info(); chat_format: {name, stop_token}.
    weights: the messages' own weights that the samples' role bytes refer to, see roles.py.
    parts: whether role bytes may hold parts of the assistant's text.
    """

    def __init__(
        self,
        prefix: str | os.PathLike,
        vocab_size: int,
        tokenizer: Mapping[str, Any] | None = None,
        chat_format: Mapping[str, Any] | None = None,
        weights: Sequence[float] = (1.0,),
        parts: bool = False,
    ):
        self.prefix, self.vocab_size = str(prefix), vocab_size
        self.dtype = np.dtype(np.uint16 if vocab_size <= 65535 else np.int32)
        self.manifest = Manifest(
            tokenizer={"vocab_size": vocab_size, **(tokenizer or {})},
            chat_format=dict(chat_format or {}),
            weights=list(weights),
        )
        self._valid = _valid_bytes(len(self.manifest.weights), FORMAT_VERSION if parts else 2)
        self._last_role = len(ALL_NAMES if parts else ROLE_NAMES) - 1
        self._lengths = array.array("i")
        self._finished = False
        self._counts_by_byte = np.zeros(256, np.int64)

    def __enter__(self) -> "ShardWriter":
        with contextlib.ExitStack() as stack:
            self._files = {ending: stack.enter_context(files.atomic_file(self.prefix + ending)) for ending in ENDINGS}
            self._stack = stack.pop_all()
        return self

    def source(self, name: str, file: str, digest: str) -> None:
        """Record that the samples added from now on come from this file."""
        self._close_source()
        self.manifest.sources.append({"name": name, "file": file, "digest": digest, "documents": [len(self._lengths)]})

    def add(self, ids: np.ndarray, role_bytes: np.ndarray) -> None:
        """Add one sample: ids [tokens] below vocab_size, role_bytes [tokens] as in roles.py. Raise DataError for invalid or no tokens."""
        ids, role_bytes = np.asarray(ids), np.asarray(role_bytes)
        if ids.ndim != 1 or ids.shape != role_bytes.shape or not len(ids):
            where = f"{self.prefix}: sample {len(self._lengths)}"
            raise DataError(
                f"{where} has ids {ids.shape} and role bytes {role_bytes.shape}; give two equal shapes, [tokens]"
            )
        self.add_many(ids, role_bytes, np.array([len(ids)]))

    def add_many(self, ids: np.ndarray, role_bytes: np.ndarray, lengths: np.ndarray) -> None:
        """Add concatenated samples. lengths: tokens of each, above 0, together len(ids)."""
        where = f"{self.prefix}: sample {len(self._lengths)}" + ("" if len(lengths) == 1 else " or one soon after it")
        if len(ids) != len(role_bytes) or len(ids) != lengths.sum() or (lengths <= 0).any():
            raise DataError(
                f"{where}: {len(ids)} ids, {len(role_bytes)} role bytes, lengths of {lengths.sum()}; they must agree"
            )
        if not len(ids):
            return
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise DataError(
                f"{where} has ids {ids.min()} to {ids.max()}, the vocabulary {self.vocab_size}; another tokenizer?"
            )
        if role_bytes.min() < 0 or role_bytes.max() > 255:
            raise DataError(f"{where} holds a role outside 0..{self._last_role}; see roles.py")
        role_bytes = role_bytes.astype(np.uint8, copy=False)
        counts = np.bincount(role_bytes, minlength=256)
        if counts[~self._valid].any():
            raise DataError(f"{where} holds a role outside 0..{self._last_role} or an unknown weight; see roles.py")
        self._files["-text.bin"].write(np.ascontiguousarray(ids, self.dtype).data)
        self._files["-role.bin"].write(np.ascontiguousarray(role_bytes).data)
        self._lengths.frombytes(np.asarray(lengths).astype(np.intc).tobytes())
        self._counts_by_byte += counts

    def copy(
        self,
        shards: "Shards",
        samples: np.ndarray,
        count: Callable[[np.ndarray, np.ndarray], Any] = lambda role_bytes, lengths: None,
    ) -> None:
        """Add samples of other shards, in the given order, with the same tokenizer. Their weights must be in our table.

        count: called with the role bytes and the lengths of each batch that is written.
        """
        table = _translation(shards.manifest.weights, self.manifest.weights)
        for some in np.array_split(samples, max(1, len(samples) // 256)):
            pairs = [(shards.tokens(int(i)), table[shards.role_bytes(int(i))]) for i in some]
            if pairs:
                lengths = np.array([len(ids) for ids, _ in pairs])
                ids, role_bytes = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
                self.add_many(ids, role_bytes, lengths)
                count(role_bytes, lengths)

    def finish(self) -> np.ndarray:
        """Write the remaining data, still under temporary names. Return the number of tokens of each sample: int32 [samples]."""
        lengths = np.array(self._lengths, np.int32)
        if not self._finished:
            write_index(self._files["-text.idx"], lengths, self.dtype)
            write_index(self._files["-role.idx"], lengths, np.dtype(np.uint8))
            self._finished = True
        return lengths

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            self.finish()
            # Older shards under this prefix end here: their manifest must not be beside new files.
            manifest_path(self.prefix).unlink(missing_ok=True)
        self._close_source()
        self.manifest.counts = self._counts()
        if any(self.manifest.counts["tokens_by_role"].get(name) for name in PART_NAMES):
            self.manifest.format_version, self.manifest.roles = FORMAT_VERSION, list(ALL_NAMES)
        elif self._counts_by_byte[len(ROLE_NAMES) :].any():
            self.manifest.format_version = 2
        self.manifest.files = {ending: _describe(Path(self.prefix + ending)) for ending in ENDINGS}
        write_manifest(self.manifest, manifest_path(self.prefix))

    def _counts(self) -> dict[str, Any]:
        role_bytes = np.arange(256)
        by_role = np.bincount(role_bytes & ROLE_BITS, self._counts_by_byte, len(ALL_NAMES)).astype(int).tolist()
        marked = int(self._counts_by_byte[role_bytes & MARKED > 0].sum())
        return {
            "samples": len(self._lengths),
            "tokens": int(self._counts_by_byte.sum()),
            "tokens_by_role": named_counts(by_role),
            **({"marked_tokens": marked} if marked else {}),
        }

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
            _check_size(self.prefix, ending, self.manifest)
        self._text, self._role = (self._open(kind) for kind in ("-text", "-role"))
        self.lengths: np.ndarray = self._text.lengths  # int32 [samples], in tokens
        self.vocab_size: int = self.manifest.tokenizer["vocab_size"]
        self._valid = _valid_bytes(len(self.manifest.weights), self.manifest.format_version)
        if not np.array_equal(self.lengths, self._role.lengths) or self._role.dtype != np.uint8:
            raise DataError(f"{self.prefix}: text and role shards do not belong together; {AGAIN}")
        self._check_counts()

    def _check_counts(self) -> None:
        """Check that samples and counts in the manifest agree with the index: sources, loss and mixing use them."""
        counts, samples = self.manifest.counts, len(self.lengths)
        ends = [end for source in self.manifest.sources for end in source["documents"]]
        counted = (counts["samples"], counts["tokens"], sum(counts["tokens_by_role"].values()))
        tokens = int(self.lengths.sum(dtype=np.int64))
        if counted != (samples, tokens, tokens) or ends != sorted(ends) or (ends and ends[-1] > samples):
            raise DataError(f"{manifest_path(self.prefix)}: counts other samples than there are in the shards; {AGAIN}")

    def _open(self, kind: str) -> Sequences:
        return Sequences(
            self.prefix + kind, {end: self.manifest.files[kind + end]["digest"] for end in (".bin", ".idx")}
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def sequences(self) -> tuple[Sequences, Sequences]:
        """Tokens and role bytes as stored in the files."""
        return self._text, self._role

    def tokens(self, index: int) -> np.ndarray:
        """Return the ids of a sample: uint16 or int32 [tokens]. Raise DataError for an id outside the vocabulary."""
        ids = self._text[index]
        if ids.max() >= self.vocab_size or ids.min() < 0:
            where = f"{self.prefix}-text.bin: sample {index}"
            raise DataError(f"{where} holds id {ids.max()}, outside the vocabulary of {self.vocab_size}; {AGAIN}")
        return ids

    def roles(self, index: int) -> np.ndarray:
        """Return the roles of a sample's tokens, without mark bits: uint8 [tokens], 0 to 6."""
        return self.role_bytes(index) & ROLE_BITS

    def role_bytes(self, index: int) -> np.ndarray:
        """Return the role bytes of a sample's tokens, uint8 [tokens]; see roles.py. Raise DataError for an invalid one."""
        role_bytes = self._role[index]
        if not self._valid[role_bytes].all():
            wrong = role_bytes[~self._valid[role_bytes]][0]
            raise DataError(f"{self.prefix}-role.bin: sample {index} holds the unknown role {wrong}; {AGAIN}")
        return role_bytes

    def loss_weights(self, by_role: np.ndarray, marked_loss_weight: float = 1.0) -> np.ndarray:
        """Return the loss weight of each role byte in these shards: float32 [256]; see roles.byte_weights."""
        return byte_weights(by_role, self.manifest.weights, marked_loss_weight)

    def __reduce__(self) -> tuple[Any, ...]:
        return Shards, (self.prefix,)


def open_shards(prefix: str | os.PathLike, verify: bool = False) -> Shards:
    """Open PREFIX's shards. Check manifest, sizes, every number of the indexes and their hashes, which takes little time.

    verify: also read the .bin files and compare their hashes; verify.py does this for many shards at once.
    Raise DataError naming the file and the remedy.
    """
    shards = Shards(prefix)
    for sequences in shards.sequences if verify else ():
        sequences.verify()
    return shards


def remove_shards(prefix: str | os.PathLike) -> None:
    """Remove the shards of a prefix if they exist, the manifest first."""
    for path in (manifest_path(prefix), *(Path(f"{prefix}{ending}") for ending in ENDINGS)):
        path.unlink(missing_ok=True)


def named_counts(by_role: Sequence[int]) -> dict[str, int]:
    """Return the tokens of each role by its name; parts of the assistant's text only if there are any."""
    counts = dict(zip(ALL_NAMES, by_role, strict=False))
    return {name: count for name, count in counts.items() if count or name in ROLE_NAMES}


def _valid_bytes(weights: int, version: int = FORMAT_VERSION) -> np.ndarray:
    """Return which role bytes are valid in shards of a format version with so many weights: bool [256]."""
    role_bytes = np.arange(256)
    if version == 1:
        return role_bytes < len(ROLE_NAMES)
    roles = len(ALL_NAMES if version > 2 else ROLE_NAMES)
    return (role_bytes & ROLE_BITS < roles) & (role_bytes >> WEIGHT_SHIFT < weights)


def _translation(old: Sequence[float], new: Sequence[float]) -> np.ndarray:
    """Return the role bytes for a new table of weights, indexed by those for the old one: uint8 [256]. new: contains all of old."""
    numbers = np.array([new.index(weight) for weight in old] + [0] * (16 - len(old)))
    role_bytes = np.arange(256)
    return (role_bytes & (ROLE_BITS | MARKED) | numbers[role_bytes >> WEIGHT_SHIFT] << WEIGHT_SHIFT).astype(np.uint8)


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "digest": files.digest(path)}


def _check_size(prefix: str, ending: str, manifest: Manifest) -> None:
    path = Path(prefix + ending)
    if not path.is_file():
        raise DataError(f"{path}: no such file, though the manifest names it; {AGAIN}")
    if path.stat().st_size != manifest.files[ending]["bytes"]:
        written = manifest.files[ending]["bytes"]
        raise DataError(f"{path}: {path.stat().st_size} bytes, written with {written}; {COPY}")

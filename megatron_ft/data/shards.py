"""Role-labelled shards: PREFIX-text.{bin,idx} with tokens, PREFIX-role.{bin,idx} with the role of every token,
PREFIX-manifest.json.

A sample is one conversation. A byte of the role shard may carry a mark and a weight too: roles.py. Shards exist once
their manifest does: it is written last and names every file's size and hash, so that an interrupted run leaves nothing
that opens. Knows nothing of chat formats; packing and mixing are the loader's.
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
from megatron_ft.data.roles import MARKED, ROLE_BITS, ROLE_NAMES, WEIGHT_SHIFT, code_weights
from megatron_ft.errors import DataError

COPY = f"copy it again, or {AGAIN}"
ENDINGS = ("-text.bin", "-text.idx", "-role.bin", "-role.idx")


class ShardWriter:
    """Writes shards; a context manager. An error inside the block leaves what was there before.

    vocab_size: ids must be below it. tokenizer: Tokenizer.info(); chat_format: {name, stop_token}.
    weights: the messages' own weights that the samples' role bytes refer to, see roles.py.
    """

    def __init__(
        self,
        prefix: str | os.PathLike,
        vocab_size: int,
        tokenizer: Mapping[str, Any] | None = None,
        chat_format: Mapping[str, Any] | None = None,
        weights: Sequence[float] = (1.0,),
    ):
        self.prefix, self.vocab_size = str(prefix), vocab_size
        self.dtype = np.dtype(np.uint16 if vocab_size <= 65535 else np.int32)
        self.manifest = Manifest(
            tokenizer={"vocab_size": vocab_size, **(tokenizer or {})},
            chat_format=dict(chat_format or {}),
            weights=list(weights),
        )
        self._lengths = array.array("i")
        self._finished = False
        self._by_code = np.zeros(256, np.int64)

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
        """One sample: ids [tokens] below vocab_size, roles [tokens] as in roles.py. Raise DataError for anything else,
        no tokens included."""
        ids, roles = np.asarray(ids), np.asarray(roles)
        if ids.ndim != 1 or ids.shape != roles.shape or not len(ids):
            where = f"{self.prefix}: sample {len(self._lengths)}"
            raise DataError(f"{where} has ids {ids.shape} and roles {roles.shape}; give two equal shapes, [tokens]")
        self.add_many(ids, roles, np.array([len(ids)]))

    def add_many(self, ids: np.ndarray, roles: np.ndarray, lengths: np.ndarray) -> None:
        """Samples that lie one after another. lengths: tokens of each, above 0, together len(ids)."""
        where = f"{self.prefix}: sample {len(self._lengths)}" + ("" if len(lengths) == 1 else " or one soon after it")
        if len(ids) != len(roles) or len(ids) != lengths.sum() or (lengths <= 0).any():
            raise DataError(f"{where}: {len(ids)} ids, {len(roles)} roles, lengths of {lengths.sum()}; they must agree")
        if not len(ids):
            return
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise DataError(
                f"{where} has ids {ids.min()} to {ids.max()}, the vocabulary {self.vocab_size}; another tokenizer?"
            )
        if roles.min() < 0 or roles.max() > 255:
            raise DataError(f"{where} holds a role outside 0..{len(ROLE_NAMES) - 1}; see roles.py")
        roles = roles.astype(np.uint8, copy=False)
        counts = np.bincount(roles, minlength=256)
        if counts[~_valid_codes(len(self.manifest.weights))].any():
            raise DataError(f"{where} holds a role outside 0..{len(ROLE_NAMES) - 1} or an unknown weight; see roles.py")
        self._files["-text.bin"].write(np.ascontiguousarray(ids, self.dtype).data)
        self._files["-role.bin"].write(np.ascontiguousarray(roles).data)
        self._lengths.frombytes(np.asarray(lengths).astype(np.intc).tobytes())
        self._by_code += counts

    def copy(
        self,
        shards: "Shards",
        samples: np.ndarray,
        count: Callable[[np.ndarray, np.ndarray], Any] = lambda codes, lengths: None,
    ) -> None:
        """Samples of other shards, in the given order, with the same tokenizer. Their weights must be in our table.

        count: called with the role bytes and the lengths of every part that is written.
        """
        table = _translation(shards.manifest.weights, self.manifest.weights)
        for some in np.array_split(samples, max(1, len(samples) // 256)):
            pairs = [(shards.tokens(int(i)), table[shards.codes(int(i))]) for i in some]
            if pairs:
                lengths = np.array([len(ids) for ids, _ in pairs])
                ids, codes = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
                self.add_many(ids, codes, lengths)
                count(codes, lengths)

    def finish(self) -> np.ndarray:
        """Write what is left to write, still under temporary names. Returns the samples' tokens: int32 [samples]."""
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
            # Older shards under this prefix end here: their manifest must not stand beside new files.
            manifest_path(self.prefix).unlink(missing_ok=True)
        self._close_source()
        self.manifest.counts = self._counts()
        if self._by_code[len(ROLE_NAMES) :].any():
            self.manifest.format_version = FORMAT_VERSION
        self.manifest.files = {ending: _describe(Path(self.prefix + ending)) for ending in ENDINGS}
        write_manifest(self.manifest, manifest_path(self.prefix))

    def _counts(self) -> dict[str, Any]:
        codes = np.arange(256)
        by_role = np.bincount(codes & ROLE_BITS, self._by_code, len(ROLE_NAMES)).astype(int).tolist()
        marked = int(self._by_code[codes & MARKED > 0].sum())
        return {
            "samples": len(self._lengths),
            "tokens": int(self._by_code.sum()),
            "tokens_by_role": dict(zip(ROLE_NAMES, by_role, strict=False)),
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
        self._valid = _valid_codes(len(self.manifest.weights), extended=self.manifest.format_version > 1)
        if not np.array_equal(self.lengths, self._role.lengths) or self._role.dtype != np.uint8:
            raise DataError(f"{self.prefix}: text and role shards do not belong together; {AGAIN}")
        self._check_counts()

    def _check_counts(self) -> None:
        """Check that what the manifest says of samples is true of the index: sources use it, loss and mixing use its counts."""
        counts, samples = self.manifest.counts, len(self.lengths)
        ends = [end for source in self.manifest.sources for end in source["documents"]]
        said = (counts["samples"], counts["tokens"], sum(counts["tokens_by_role"].values()))
        tokens = int(self.lengths.sum(dtype=np.int64))
        if said != (samples, tokens, tokens) or ends != sorted(ends) or (ends and ends[-1] > samples):
            raise DataError(f"{manifest_path(self.prefix)}: counts other samples than there are in the shards; {AGAIN}")

    def _open(self, kind: str) -> Sequences:
        return Sequences(
            self.prefix + kind, {end: self.manifest.files[kind + end]["digest"] for end in (".bin", ".idx")}
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def sequences(self) -> tuple[Sequences, Sequences]:
        """Tokens and roles as they lie in the files."""
        return self._text, self._role

    def tokens(self, index: int) -> np.ndarray:
        """The ids of a sample: uint16 or int32 [tokens]. Raise DataError for an id outside the vocabulary."""
        ids = self._text[index]
        if ids.max() >= self.vocab_size or ids.min() < 0:
            where = f"{self.prefix}-text.bin: sample {index}"
            raise DataError(f"{where} holds id {ids.max()}, outside the vocabulary of {self.vocab_size}; {AGAIN}")
        return ids

    def roles(self, index: int) -> np.ndarray:
        """The roles of a sample's tokens, marks and weights aside: uint8 [tokens], 0 to 3."""
        return self.codes(index) & ROLE_BITS

    def codes(self, index: int) -> np.ndarray:
        """The bytes of a sample's tokens in the role shard, uint8 [tokens]; see roles.py. Raise DataError for one that
        means nothing."""
        codes = self._role[index]
        if not self._valid[codes].all():
            wrong = codes[~self._valid[codes]][0]
            raise DataError(f"{self.prefix}-role.bin: sample {index} holds the unknown role {wrong}; {AGAIN}")
        return codes

    def loss_weights(self, by_role: np.ndarray, marked_loss_weight: float = 1.0) -> np.ndarray:
        """The loss weight of each value of codes() in these shards: float32 [256]; see roles.code_weights."""
        return code_weights(by_role, self.manifest.weights, marked_loss_weight)

    def __reduce__(self) -> tuple[Any, ...]:
        return Shards, (self.prefix,)


def open_shards(prefix: str | os.PathLike, verify: bool = False) -> Shards:
    """Open PREFIX's shards and check what is cheap: manifest, sizes, every number of the indexes, their hashes.

    verify: read the .bin files too and compare their hashes; verify.py does it for many shards at once.
    Raise DataError naming the file and the remedy.
    """
    shards = Shards(prefix)
    for sequences in shards.sequences if verify else ():
        sequences.verify()
    return shards


def remove_shards(prefix: str | os.PathLike) -> None:
    """Remove a prefix's shards where there are any, the manifest first."""
    for path in (manifest_path(prefix), *(Path(f"{prefix}{ending}") for ending in ENDINGS)):
        path.unlink(missing_ok=True)


def _valid_codes(weights: int, extended: bool = True) -> np.ndarray:
    """Return which bytes mean something in shards with so many weights: bool [256]."""
    codes = np.arange(256)
    valid = (codes & ROLE_BITS < len(ROLE_NAMES)) & (codes >> WEIGHT_SHIFT < weights)
    return valid if extended else codes < len(ROLE_NAMES)


def _translation(old: Sequence[float], new: Sequence[float]) -> np.ndarray:
    """Role bytes under one table of weights -> under another that holds all of the first: uint8 [256]."""
    numbers = np.array([new.index(weight) for weight in old] + [0] * (16 - len(old)))
    codes = np.arange(256)
    return (codes & (ROLE_BITS | MARKED) | numbers[codes >> WEIGHT_SHIFT] << WEIGHT_SHIFT).astype(np.uint8)


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "digest": files.digest(path)}


def _check_size(prefix: str, ending: str, manifest: Manifest) -> None:
    path = Path(prefix + ending)
    if not path.is_file():
        raise DataError(f"{path}: no such file, though the manifest names it; {AGAIN}")
    if path.stat().st_size != manifest.files[ending]["bytes"]:
        written = manifest.files[ending]["bytes"]
        raise DataError(f"{path}: {path.stat().st_size} bytes, written with {written}; {COPY}")

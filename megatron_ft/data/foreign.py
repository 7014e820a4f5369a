"""Role-labelled shards that other tools wrote: Open-Assistant's pretokenizer, Megatron-LLM, or megatron-core's IndexedDatasetBuilder.

They have no manifest. So neither their tokenizer nor damage can be checked: ids must be below the model's vocabulary, roles must be known,
and special_tokens.json, which Open-Assistant's pretokenizer writes beside them, must not contradict the model's tokenizer.
Looks to the loader like our own shards.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ft.data.manifest import Manifest, compare_added, manifest_path
from megatron_ft.data.mmididx import Sequences, read_foreign_index
from megatron_ft.data.roles import ROLE_NAMES, byte_weights
from megatron_ft.data.shards import Shards, open_shards
from megatron_ft.errors import DataError
from megatron_ft.files import read_json
from megatron_ft.log import logger

AGAIN = "pretokenize again, with the tool that wrote it or with megatron-ft"
SPECIAL_TOKENS = "special_tokens.json"
_PART = 1 << 24  # numbers that are counted at a time
log = logger("data")


class ForeignShards:
    """Opened shards without a manifest. vocab_size: of the model; None: not known, ids are not checked.

    Raise DataError naming the file for what no such tool writes.
    """

    def __init__(self, prefix: str | os.PathLike, vocab_size: int | None = None):
        self.prefix = str(prefix)
        self._text, self._role = (Sequences(f"{prefix}-{kind}", foreign=True) for kind in ("text", "role"))
        self.lengths: np.ndarray = self._text.lengths  # int32 [samples], in tokens
        self.vocab_size = 1 << 31 if vocab_size is None else vocab_size
        if not np.array_equal(self.lengths, self._role.lengths):
            raise DataError(f"{self.prefix}: text and role shards do not belong together; {AGAIN}")
        tokens = int(self.lengths.sum(dtype=np.int64))
        counts = dict(zip(ROLE_NAMES, self._count_roles(tokens), strict=False))
        self.special_tokens = _special_tokens(Path(prefix).parent / SPECIAL_TOKENS)
        self.manifest = Manifest(
            {"added_tokens": self.special_tokens} if self.special_tokens else {},
            counts={"samples": len(self.lengths), "tokens": tokens, "tokens_by_role": counts},
        )

    def _count_roles(self, tokens: int) -> list[int]:
        counts = np.zeros(len(ROLE_NAMES), np.int64)
        for start in range(0, tokens, _PART):
            roles = self._known(self._role.read(start, min(_PART, tokens - start)), f"number {start} or one after it")
            counts += np.bincount(roles, minlength=len(counts))
        return counts.tolist()

    def _known(self, roles: np.ndarray, where: str) -> np.ndarray:
        if len(roles) and not 0 <= roles.min() <= roles.max() < len(ROLE_NAMES):
            wrong = roles[(roles < 0) | (roles >= len(ROLE_NAMES))][0]
            raise DataError(f"{self.prefix}-role.bin: {where} is the unknown role {wrong}; {AGAIN}")
        return roles.astype(np.uint8)

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, index: int) -> np.ndarray:
        """Return the ids of a sample, [tokens]. Raise DataError for an id outside the vocabulary."""
        ids = self._text[index]
        if len(ids) and (ids.max() >= self.vocab_size or ids.min() < 0):
            raise DataError(
                f"{self.prefix}-text.bin: sample {index} holds ids {ids.min()} to {ids.max()}, the model's vocabulary has "
                f"{self.vocab_size}: tokenize with the model's tokenizer"
            )
        return ids

    def roles(self, index: int) -> np.ndarray:
        """Return the roles of a sample's tokens: uint8 [tokens]."""
        return self.role_bytes(index)

    def role_bytes(self, index: int) -> np.ndarray:
        """Return the same: there are neither marks nor weights."""
        return self._known(self._role[index], f"a token of sample {index}")

    def loss_weights(self, by_role: np.ndarray, marked_loss_weight: float = 1.0) -> np.ndarray:
        """Return the same as Shards.loss_weights."""
        return byte_weights(by_role, (1.0,), marked_loss_weight)


def open_any(
    prefix: str | os.PathLike, vocab_size: int | None = None, tokenizer: Mapping[str, Any] | None = None
) -> Shards | ForeignShards:
    """Open our own shards, or another tool's with a warning. tokenizer: Tokenizer.info() of the model's, where there is one."""
    if not is_foreign(prefix):
        return open_shards(prefix)
    shards = ForeignShards(prefix, vocab_size)
    compare_special(shards, tokenizer)
    log.warning(
        f"{prefix}: shards without a manifest, as Open-Assistant's pretokenizer and Megatron-LLM write them: the model's tokenizer "
        f"is taken for theirs, and damaged files are not detected"
    )
    return shards


def compare_special(shards: ForeignShards, tokenizer: Mapping[str, Any] | None) -> None:
    """Raise DataError if the added tokens are not the tokenizer's. tokenizer: as open_any."""
    if tokenizer and "added_tokens" in tokenizer:
        compare_added(shards.special_tokens, tokenizer["added_tokens"], Path(shards.prefix).parent / SPECIAL_TOKENS)


def is_foreign(prefix: str | os.PathLike) -> bool:
    """Return whether PREFIX names role-labelled shards of another tool.

    Ours without their manifest are unfinished, so they are not taken for another tool's: they have roles of one byte, and every
    sample is a document.
    """
    index = Path(f"{prefix}-role.idx")
    if manifest_path(prefix).exists() or not index.is_file():
        return False
    dtype, lengths, documents = read_foreign_index(index)
    return dtype != np.uint8 or not np.array_equal(documents, np.arange(len(lengths) + 1))


def _special_tokens(path: Path) -> dict[str, int]:
    """Return the ids of added tokens in Open-Assistant's file, in their order; {} without one."""
    content = read_json(path) if path.is_file() else {}
    if not isinstance(content, dict) or not all(type(index) is int for index in content.values()):
        return {}
    return dict(sorted(content.items(), key=lambda entry: entry[1]))

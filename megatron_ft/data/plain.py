"""Plain pretraining shards (PREFIX.bin, PREFIX.idx, no roles), as Megatron's preprocessing writes them. Every token is trained on.

They have the same interface as role-labelled shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_ft.data.manifest import Manifest
from megatron_ft.data.mmididx import Sequences
from megatron_ft.data.roles import CONTEXT, ROLE_NAMES
from megatron_ft.errors import DataError


class PlainShards:
    """Documents as samples. vocab_size: of the model; ids must be below it. part: which of them, see part_of(); None: all."""

    def __init__(self, prefix: str, vocab_size: int, part: tuple[Sequence[float], int] | None = None):
        self.prefix, self.vocab_size = prefix, vocab_size
        self._text = Sequences(prefix, foreign=True)
        self._starts = _document_starts(self._text)
        if part:
            first, end = part_of(len(self._starts) - 1, *part)
            self._starts = self._starts[first : end + 1]
        self.tokens_in_file = int(self._text.lengths.sum(dtype=np.int64))
        self.lengths: np.ndarray = np.diff(self._starts).astype(np.int32)
        tokens = int(self.lengths.sum(dtype=np.int64))
        counts = {name: 0 for name in ROLE_NAMES} | {ROLE_NAMES[CONTEXT]: tokens}
        self.manifest = Manifest(counts={"samples": len(self.lengths), "tokens": tokens, "tokens_by_role": counts})

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def starts(self) -> np.ndarray:
        """Return the place in the file of each document's first token, and the end: int64."""
        return self._starts

    def tokens(self, index: int) -> np.ndarray:
        """Return the ids of a document. Raise DataError for an id outside the vocabulary of the model."""
        ids = self._text.read(int(self._starts[index]), int(self.lengths[index]))
        if len(ids) and (ids.max() >= self.vocab_size or ids.min() < 0):
            raise DataError(
                f"{self.prefix}.bin: document {index} holds id {ids.max()}, the model's vocabulary has {self.vocab_size}: "
                f"tokenize with the model's tokenizer"
            )
        return ids

    def role_bytes(self, index: int) -> np.ndarray:
        """Return role bytes, all context."""
        return np.full(int(self.lengths[index]), CONTEXT, np.uint8)

    def loss_weights(self, by_role: np.ndarray, marked_loss_weight: float = 1.0) -> np.ndarray:
        """Return weight 1 for language modelling, whatever the weights of the roles."""
        return np.ones(256, np.float32)


def _document_starts(text: Sequences) -> np.ndarray:
    """Return the place of each document's first token, and the end: int64. Where documents were never ended, each sequence is one."""
    ends = np.cumsum([0, *text.lengths], dtype=np.int64)
    if len(text.documents) == 1:
        return ends
    return ends[np.unique([*text.documents, len(text)])]


def part_of(documents: int, shares: Sequence[float], number: int) -> tuple[int, int]:
    """Return first and end of a part's documents, as Megatron divides them: rounded shares, what rounding loses goes to the first part."""
    sizes = [round(share / sum(shares) * documents) for share in shares]
    shift = documents - sum(sizes)
    ends = [0, *(sum(sizes[: last + 1]) + shift for last in range(len(sizes)))]
    return ends[number], ends[number + 1]


def is_plain(prefix: str) -> bool:
    """Return whether PREFIX names plain shards and no role-labelled ones."""
    return Path(f"{prefix}.idx").is_file() and not Path(f"{prefix}-text.idx").is_file()

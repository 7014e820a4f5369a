"""Batches for training: role-labelled shards in, microbatches of tokens, labels and loss weights out.

Every batch is a function of (seed, number of rows consumed so far): nothing else has to be saved to resume, and any number of
data-parallel ranks draws the same rows in the same order. numpy only; knows nothing of models or process groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ft.data import packing
from megatron_ft.data.roles import ROLE_NAMES
from megatron_ft.data.shards import Shards
from megatron_ft.errors import DataError


@dataclass(frozen=True)
class Microbatch:
    """What a rank feeds its model at once. b rows of s positions.

    A padding position holds token 0 with weight 0. `segments` holds, for a packed batch, the lengths of all samples in
    the b rows laid end to end, each row's padding as a segment of its own.
    """

    tokens: np.ndarray
    """[b, s] int64"""
    labels: np.ndarray
    """[b, s] int64: the token that follows."""
    weights: np.ndarray
    """[b, s] float32: the loss weight of the label."""
    roles: np.ndarray
    """[b, s] uint8: the role of the label; 255 on padding."""
    groups: np.ndarray
    """[breakdowns, b, s] int64: which role, source and stretch of positions each label belongs to (see BREAKDOWNS); -1 on padding."""
    segments: np.ndarray | None
    """[k] int32, summing to b * s; None when every row is one sample."""

    @property
    def real_tokens(self) -> int:
        return int((self.roles != PADDING).sum())

    @property
    def supervised_tokens(self) -> int:
        return int((self.weights > 0).sum())


PADDING = 255
BREAKDOWNS = ("role", "source", "position")
"""What the loss can be taken apart by."""
STRETCHES = (0, 128, 512, 2048, 8192, 32768, 131072)
"""Where each stretch of positions begins, counted from the start of a sample."""
_NOTHING = np.zeros(0, np.int64)


class ChatDataset:
    """Rows of chat samples from one or more shards, shuffled anew each epoch."""

    def __init__(
        self, shards: Sequence[Shards], seq_length: int, loss_weights: np.ndarray, seed: int,
        packed: bool = True, shuffle: bool = True,
    ):  # fmt: skip
        self.shards, self.seq_length, self.seed = list(shards), seq_length, seed
        self.loss_weights = np.asarray(loss_weights, dtype=np.float32)
        self.packed, self.shuffle = packed, shuffle
        lengths = np.concatenate([np.asarray(shard.lengths) for shard in self.shards])
        self._first = np.cumsum([0, *(len(shard) for shard in self.shards)])
        self._sizes = packing.positions(lengths, seq_length)
        self.truncated = int((lengths > seq_length + 1).sum())
        if not (self._sizes > 0).any():
            names = ", ".join(str(shard.prefix) for shard in self.shards)
            raise DataError(f"{names}: no sample of two tokens or more, nothing to train on; pretokenize again")
        self.group_names, self._source_of = self._name_groups()
        self._epoch_starts = [0]
        self._plans: dict[int, tuple[packing.Rows, np.ndarray]] = {}

    def _name_groups(self) -> tuple[dict[str, tuple[str, ...]], np.ndarray]:
        """(names of the groups of each breakdown, source of each sample). Shards without sources are a source of their own."""
        names: dict[str, int] = {}
        source_of = np.zeros(len(self._sizes), np.int64)
        for first, shard in zip(self._first[:-1], self.shards, strict=True):
            sources = shard.manifest.sources or [{"name": Path(shard.prefix).name, "documents": [0, len(shard)]}]
            for source in sources:
                begin, end = source["documents"]
                source_of[first + begin : first + end] = names.setdefault(source["name"], len(names))
        ends = [f"-{end - 1}" for end in STRETCHES[1:]] + ["+"]
        stretches = tuple(f"{begin}{end}" for begin, end in zip(STRETCHES, ends, strict=True))
        return {"role": ROLE_NAMES, "source": tuple(names), "position": stretches}, source_of

    @property
    def num_samples(self) -> int:
        return len(self._sizes)

    def epoch_rows(self, epoch: int) -> packing.Rows:
        """The rows of one epoch. Packed, its emptiest row is held back and packed with the next epoch's samples."""
        if epoch not in self._plans:
            known = max((e for e in self._plans if e < epoch), default=-1)
            held = self._plans[known][1] if known >= 0 else _NOTHING
            for e in range(known + 1, epoch + 1):
                rows, held = self._plan(e, held)
                self._plans = {k: v for k, v in self._plans.items() if k in (0, e - 1)} | {e: (rows, held)}
        return self._plans[epoch][0]

    def _plan(self, epoch: int, held: np.ndarray) -> tuple[packing.Rows, np.ndarray]:
        order, rng = np.flatnonzero(self._sizes), np.random.default_rng([self.seed, epoch])
        if self.shuffle:
            order = rng.permutation(order)
        if not self.packed:
            return packing.one_per_row(order), held
        rows = packing.best_fit(np.concatenate([held, order]), self._sizes, self.seq_length)
        if not self.shuffle:
            return rows, _NOTHING
        rows, held = packing.without_emptiest(rows, self._sizes, self.seq_length)
        return packing.shuffled(rows, rng), held

    def fill(self) -> float:
        """Share of the first epoch's positions that hold a token."""
        return packing.fill(self.epoch_rows(0), self._sizes, self.seq_length)

    def locate(self, index: int) -> tuple[int, int]:
        """(epoch, row in that epoch) of the index-th row since the start of training."""
        while self._epoch_starts[-1] <= index:
            rows = len(self.epoch_rows(len(self._epoch_starts) - 1))
            self._epoch_starts.append(self._epoch_starts[-1] + rows)
        epoch = int(np.searchsorted(self._epoch_starts, index, side="right")) - 1
        return epoch, index - self._epoch_starts[epoch]

    def samples_of(self, index: int) -> np.ndarray:
        """Sample numbers in the index-th row since the start of training."""
        epoch, row = self.locate(index)
        return self.epoch_rows(epoch).samples(row)

    def microbatch(self, rows: Sequence[int]) -> Microbatch:
        """The rows with these running numbers, as one microbatch."""
        shape = (len(rows), self.seq_length)
        tokens, labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        weights, roles = np.zeros(shape, np.float32), np.full(shape, PADDING, np.uint8)
        groups = np.full((len(BREAKDOWNS), *shape), -1, np.int64)
        segments: list[int] = []
        for i, row in enumerate(rows):
            at = 0
            for sample in self.samples_of(row):
                size = int(self._sizes[sample])
                text, role = self._read(int(sample), size + 1)
                here = slice(at, at + size)
                tokens[i, here], labels[i, here] = text[:-1], text[1:]
                roles[i, here], weights[i, here] = role[1:], self.loss_weights[role[1:]]
                groups[0, i, here], groups[1, i, here] = role[1:], self._source_of[sample]
                groups[2, i, here] = np.searchsorted(STRETCHES, np.arange(size), side="right") - 1
                segments.append(size)
                at += size
            if at < self.seq_length:
                segments.append(self.seq_length - at)
        return Microbatch(tokens, labels, weights, roles, groups, np.array(segments, np.int32) if self.packed else None)

    def _read(self, sample: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        shard = int(np.searchsorted(self._first, sample, side="right")) - 1
        local = sample - int(self._first[shard])
        return self.shards[shard].tokens(local)[:count], self.shards[shard].roles(local)[:count]


def step_rows(
    consumed: int, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[list[int]]:
    """Row numbers of one step, a list for each of this rank's microbatches. The ranks' lists partition the global batch."""
    stride = micro_batch_size * dp_size
    firsts = range(consumed + dp_rank * micro_batch_size, consumed + global_batch_size, stride)
    return [list(range(first, first + micro_batch_size)) for first in firsts]

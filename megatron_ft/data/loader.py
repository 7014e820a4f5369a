"""Batches for training: reads role-labelled shards and returns microbatches of tokens, labels and loss weights.

Every batch is a function of (seed, number of rows consumed so far). So nothing else has to be saved to resume, and any number of
data-parallel ranks gets the same rows in the same order. Uses only numpy; models and process groups are in other modules.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_ft.data import packing
from megatron_ft.data.fingerprint import fingerprint
from megatron_ft.data.manifest import Manifest
from megatron_ft.data.pieces import draw, pieces_of, pieces_per_epoch
from megatron_ft.data.plan_cache import cached
from megatron_ft.data.roles import ALL_NAMES, PART_NAMES, ROLE_BITS, ROLE_NAMES, last_turn
from megatron_ft.errors import DataError


@dataclass(frozen=True)
class Microbatch:
    """The input of the model on one rank: b rows of s positions.

    A padding position holds token 0 with weight 0. `segments` holds, for a packed batch, the lengths of all samples in
    the b rows laid end to end, each row's padding as a segment of its own.
    """

    tokens: np.ndarray
    """[b, s] int64"""
    labels: np.ndarray
    """[b, s] int64: the token that follows."""
    weights: np.ndarray
    """[b, s] float32: the loss weight of the label."""
    groups: np.ndarray
    """[breakdowns, b, s] int64: which role, source and stretch of positions each label belongs to (see BREAKDOWNS); -1 on padding."""
    segments: np.ndarray | None
    """[k] int32, summing to b * s; None when every row is one sample."""

    @property
    def roles(self) -> np.ndarray:
        """[b, s] uint8: the role of the label; 255 on padding."""
        return self.groups[0].astype(np.uint8)  # -1 becomes 255

    @property
    def real_tokens(self) -> int:
        return int((self.groups[0] >= 0).sum())

    @property
    def sample_lengths(self) -> np.ndarray:
        """Positions of each sample, padding left out. A segment is a sample or a row's padding."""
        if self.segments is None:
            return (self.roles != PADDING).sum(1)
        starts = np.cumsum(self.segments) - self.segments
        return self.segments[self.roles.ravel()[starts] != PADDING]

    @property
    def supervised_tokens(self) -> int:
        return int((self.weights > 0).sum())


PADDING = 255
BREAKDOWNS = ("role", "source", "position")
"""What the loss can be taken apart by."""
STRETCHES = (0, 128, 512, 2048, 8192, 32768, 131072)
"""Where each stretch of positions begins, counted from the start of a sample."""
PLANS = 1
"""Version of the way plans are made: one more wherever the same choices give other rows."""
WORTH_KEEPING = 100_000
"""Pieces; fewer are planned faster than a file is found."""
WORTH_COUNTING = 1_000_000
"""Pieces in all epochs of a run; of more, the first epoch's rows stand for those of each."""
_NOTHING = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Choices:
    """Settings for making rows of samples; config.sections.Data explains them."""

    seq_length: int
    seed: int = 0
    packed: bool = True
    shuffle: bool = True
    over_long: str = "cut"
    variable: bool = False
    marked_loss_weight: float = 1.0
    last_turn_only: bool = False
    shares: tuple[float, ...] | None = None
    shares_by: str = "samples"
    cache: str | None = None
    """Folder for plans of many samples, see plan_cache.py; None: in memory."""


class NothingFits(DataError):
    """A set without a single row."""


class Samples(Protocol):
    """The interface of shards: of chats, plain ones, or in memory."""

    prefix: str
    manifest: Manifest
    lengths: np.ndarray
    """Tokens of each sample."""

    def __len__(self) -> int: ...
    def tokens(self, index: int, /) -> np.ndarray: ...
    def role_bytes(self, index: int, /) -> np.ndarray: ...
    def loss_weights(self, by_role: np.ndarray, marked_loss_weight: float = 1.0) -> np.ndarray: ...


class Scored(Protocol):
    """The interface of stored log-probabilities (data/teacher_logits.py)."""

    top_k: int

    def rows(self, sample: int, first: int, count: int, /) -> np.ndarray: ...
    def record(self) -> dict: ...
    def verify(self) -> None: ...


class ChatDataset:
    """Rows of chat samples from one or more shards, shuffled anew each epoch. loss_weights: float32 [7] or [4], by role."""

    scored: Sequence[Scored] | None = None
    """A teacher's log-probabilities of the tokens of each of the shards; None: there are none."""

    def __init__(self, shards: Sequence[Samples], loss_weights: np.ndarray, choices: Choices):
        self.shards, self.choices, self.seq_length = list(shards), choices, choices.seq_length
        self.packed = choices.packed
        self._weight_by_byte = [shard.loss_weights(loss_weights, choices.marked_loss_weight) for shard in self.shards]
        lengths = np.concatenate([np.asarray(shard.lengths) for shard in self.shards])
        self._first = np.cumsum([0, *(len(shard) for shard in self.shards)])
        self.num_samples = len(lengths)
        self.over_long = int((lengths > choices.seq_length + 1).sum())
        self._pieces = pieces_of(lengths, choices.seq_length, choices.over_long)
        self._sizes = self._pieces.size
        if not len(self._pieces):
            names = ", ".join(str(shard.prefix) for shard in self.shards)
            raise NothingFits(
                f"{names}: no sample of two tokens or more that fits, nothing to train on; "
                f"pretokenize again, or keep long samples with --over_long cut"
            )
        self.group_names, self._source_of = self._name_groups()
        self._sets = np.split(np.arange(len(self._pieces)), np.searchsorted(self._pieces.sample, self._first[1:-1]))
        self._counts = self._pieces_per_epoch()
        self._epoch_starts = [0]
        self._plans: dict[int, tuple[packing.Rows, np.ndarray]] = {}
        self._planning = threading.RLock()  # microbatches are built by one thread, samples hashed by another

    def _pieces_per_epoch(self) -> np.ndarray:
        """Return the number of pieces of each set of shards in an epoch."""
        sizes = np.array([len(members) for members in self._sets])
        if self.choices.shares is None:
            return sizes
        value = np.ones(len(sizes))
        if self.choices.shares_by == "supervised_tokens":
            value = np.array([self._supervised(i) / max(1, size) for i, size in enumerate(sizes)])
        return pieces_per_epoch(sizes, np.array(self.choices.shares, float), value)

    def _supervised(self, shard: int) -> float:
        """Return the tokens of a set of shards whose role has a loss weight, from the counts of its manifest."""
        counts = self.shards[shard].manifest.counts["tokens_by_role"]
        by_role = self._weight_by_byte[shard]
        return float(
            sum(count for role, name in enumerate(ALL_NAMES) if by_role[role] and (count := counts.get(name, 0)))
        )

    def _name_groups(self) -> tuple[dict[str, tuple[str, ...]], np.ndarray]:
        """Return (names of the groups of each breakdown, source of each sample). Shards without sources count as one source."""
        names: dict[str, int] = {}
        source_of = np.zeros(self.num_samples, np.int64)
        for first, shard in zip(self._first[:-1], self.shards, strict=True):
            sources = shard.manifest.sources or [{"name": Path(shard.prefix).name, "documents": [0, len(shard)]}]
            for source in sources:
                begin, end = source["documents"]
                source_of[first + begin : first + end] = names.setdefault(source["name"], len(names))
        ends = [f"-{end - 1}" for end in STRETCHES[1:]] + ["+"]
        stretches = tuple(f"{begin}{end}" for begin, end in zip(STRETCHES, ends, strict=True))
        counts = [shard.manifest.counts.get("tokens_by_role", {}) for shard in self.shards]
        roles = ALL_NAMES if any(part in count for count in counts for part in PART_NAMES) else ROLE_NAMES
        return {"role": roles, "source": tuple(names), "position": stretches}, source_of

    def epoch_rows(self, epoch: int) -> packing.Rows:
        """Return the rows of one epoch. With packing, the emptiest row is left out and packed with the samples of the next epoch."""
        with self._planning:
            return self._planned(epoch)

    def _planned(self, epoch: int) -> packing.Rows:
        if epoch not in self._plans:
            known = max((e for e in self._plans if e < epoch), default=-1)
            held = self._plans[known][1] if known >= 0 else _NOTHING
            for e in range(known + 1, epoch + 1):
                rows, held = self._plan(e, held)
                self._plans = {k: v for k, v in self._plans.items() if k in (0, e - 1)} | {e: (rows, held)}
        return self._plans[epoch][0]

    def _plan(self, epoch: int, held: np.ndarray) -> tuple[packing.Rows, np.ndarray]:
        if self.choices.cache is None or len(self._pieces) < WORTH_KEEPING:
            return self._new_plan(epoch, held)
        choices = dataclasses.asdict(self.choices) | {"cache": None}
        del choices["last_turn_only"]  # it changes no row
        sizes = [fingerprint(array.tobytes()) for array in (self._sizes, self._first, self._counts, held)]

        def build() -> list[np.ndarray]:
            rows, left = self._new_plan(epoch, held)
            return [rows.order, rows.starts, left]

        order, starts, left = cached(Path(self.choices.cache), [PLANS, packing.WINDOW, epoch, choices, sizes], build)
        return packing.Rows(order, starts), left

    def _new_plan(self, epoch: int, held: np.ndarray) -> tuple[packing.Rows, np.ndarray]:
        rng = np.random.default_rng([self.choices.seed, epoch])
        order = draw(self._sets, self._counts, rng)
        if self.choices.shuffle:
            order = rng.permutation(order)
        if not self.packed:
            return packing.one_per_row(order), held
        rows = packing.best_fit(np.concatenate([held, order]), self._sizes, self.seq_length)
        if not self.choices.shuffle:
            return rows, _NOTHING
        rows, held = packing.without_emptiest(rows, self._sizes, self.seq_length)
        return packing.shuffled(rows, rng), held

    def rows_of(self, epochs: float) -> int:
        """Return the number of rows of the first epochs; a part of an epoch is rounded up to whole rows."""
        if epochs * len(self._pieces) > WORTH_COUNTING:
            return _up(epochs * len(self.epoch_rows(0)))
        whole = int(epochs)
        part = epochs - whole
        rows = sum(len(self.epoch_rows(epoch)) for epoch in range(whole))
        return rows + (_up(part * len(self.epoch_rows(whole))) if part else 0)

    def epochs_of(self, rows: int) -> float:
        """Return the number of epochs that the first rows are."""
        one = rows / len(self.epoch_rows(0))
        if one * len(self._pieces) > WORTH_COUNTING:
            return one
        epoch, row = self.locate(rows)
        return epoch + row / len(self.epoch_rows(epoch))

    def fill(self) -> float:
        """Return the share of the first epoch's positions that hold a token."""
        return packing.fill(self.epoch_rows(0), self._sizes, self.seq_length)

    def locate(self, index: int) -> tuple[int, int]:
        """Return (epoch, row in that epoch) of the index-th row since the start of training."""
        with self._planning:
            while self._epoch_starts[-1] <= index:
                rows = len(self.epoch_rows(len(self._epoch_starts) - 1))
                self._epoch_starts.append(self._epoch_starts[-1] + rows)
        epoch = int(np.searchsorted(self._epoch_starts, index, side="right")) - 1
        return epoch, index - self._epoch_starts[epoch]

    def samples_of(self, index: int) -> np.ndarray:
        """Sample numbers in the index-th row since the start of training."""
        return self._pieces.sample[self._row(index)]

    def _row(self, index: int) -> np.ndarray:
        epoch, row = self.locate(index)
        return self.epoch_rows(epoch).samples(row)

    def microbatch(self, rows: Sequence[int], end: int | None = None) -> Microbatch:
        """Return the rows with these running numbers as one microbatch; those from `end` on are empty."""
        pieces = self._pieces_of(rows, end)
        shape = (len(rows), self._width(pieces))
        tokens, labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        weights = np.zeros(shape, np.float32)
        groups = np.full((len(BREAKDOWNS), *shape), -1, np.int64)
        segments: list[int] = []
        for i, row in enumerate(pieces):
            at = 0
            for piece in row.tolist():
                text, role_bytes, weight, source = self._read(piece)
                size = len(text) - 1
                here = slice(at, at + size)
                tokens[i, here], labels[i, here] = text[:-1], text[1:]
                weights[i, here] = weight[1:]
                groups[0, i, here], groups[1, i, here] = role_bytes[1:] & ROLE_BITS, source
                groups[2, i, here] = np.searchsorted(STRETCHES, np.arange(size), side="right") - 1
                segments.append(size)
                at += size
            if at < shape[1]:
                segments.append(shape[1] - at)
        return Microbatch(tokens, labels, weights, groups, np.array(segments, np.int32) if self.packed else None)

    def top(self, rows: Sequence[int], end: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return a teacher's most likely labels for the microbatch of these rows: ids [k, b, s] int32, log-probabilities [k, b, s]
        float16, the probability of all others [b, s] float32. Padding has zeros.
        """
        assert self.scored
        pieces = self._pieces_of(rows, end)
        shape = (self.scored[0].top_k, len(rows), self._width(pieces))
        ids, log_probs, tail = np.zeros(shape, np.int32), np.zeros(shape, np.float16), np.zeros(shape[1:], np.float32)
        for i, row in enumerate(pieces):
            at = 0
            for piece in row.tolist():
                shard, local = self._sample_of(piece)
                size = int(self._sizes[piece])
                found = self.scored[shard].rows(local, int(self._pieces.start[piece]) + 1, size)
                here = slice(at, at + size)
                ids[:, i, here], log_probs[:, i, here] = found["ids"].T, found["log_probs"].T
                tail[i, here] = found["tail"]
                at += size
        return ids, log_probs, tail

    def width(self, rows: Sequence[int], end: int | None = None) -> int:
        """Return the positions in each row of the microbatch of these rows, without building it."""
        return self._width(self._pieces_of(rows, end))

    def _pieces_of(self, rows: Sequence[int], end: int | None) -> list[np.ndarray]:
        return [self._row(row) if end is None or row < end else _NOTHING for row in rows]

    def _width(self, rows: Sequence[np.ndarray]) -> int:
        """Return the positions of a row: seq_length, or with `variable` the longest of these rows, rounded up to 16."""
        if self.packed or not self.choices.variable:
            return self.seq_length
        longest = max(1, *(int(self._sizes[row].sum()) for row in rows))
        return min(self.seq_length, -(-longest // 16) * 16)

    def _read(self, piece: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Return a piece's tokens, role bytes and loss weights, [size + 1] each, and its source."""
        sample = int(self._pieces.sample[piece])
        shard, local = self._sample_of(piece)
        here = slice(int(self._pieces.start[piece]), int(self._pieces.start[piece] + self._sizes[piece] + 1))
        opened = self.shards[shard]
        role_bytes = opened.role_bytes(local)
        weights = self._weight_by_byte[shard][role_bytes]
        if self.choices.last_turn_only:
            weights[: last_turn(role_bytes)] = 0
        return opened.tokens(local)[here], role_bytes[here], weights[here], int(self._source_of[sample])

    def _sample_of(self, piece: int) -> tuple[int, int]:
        """Return the shard of a piece, and its sample's number there."""
        sample = int(self._pieces.sample[piece])
        shard = int(np.searchsorted(self._first, sample, side="right")) - 1
        return shard, sample - int(self._first[shard])


def step_rows(
    consumed: int, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[list[int]]:
    """Return the row numbers of one step, a list for each of this rank's microbatches. All ranks' lists partition the global batch."""
    stride = micro_batch_size * dp_size
    firsts = range(consumed + dp_rank * micro_batch_size, consumed + global_batch_size, stride)
    return [list(range(first, first + micro_batch_size)) for first in firsts]


def _up(rows: float) -> int:
    """Return a number of rows rounded up, without what floats add to whole numbers."""
    return math.ceil(round(rows, 6))

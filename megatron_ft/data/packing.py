"""Assigns samples to rows: best fit, largest first within a window, deterministic, without torch.

A sample of n tokens takes n - 1 positions of a row, at most `seq_length`: its last token is only a label. The loader and the attention
restart positions and attention at every sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WINDOW = 8192
"""Samples looked at together. Largest first fills rows best; the window keeps samples near their place in the shuffle."""


@dataclass(frozen=True)
class Rows:
    """Row i holds samples order[starts[i]:starts[i + 1]], in that order."""

    order: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def samples(self, row: int) -> np.ndarray:
        return self.order[self.starts[row] : self.starts[row + 1]]


def positions(lengths: np.ndarray, seq_length: int) -> np.ndarray:
    """Return the positions that each sample takes in a row: its tokens less one, at most seq_length."""
    return np.clip(np.asarray(lengths, dtype=np.int64) - 1, 0, seq_length)


def one_per_row(order: np.ndarray) -> Rows:
    """Return the plan without packing: every sample alone in its row."""
    return Rows(np.asarray(order, dtype=np.int64), np.arange(len(order) + 1, dtype=np.int64))


def best_fit(order: np.ndarray, sizes: np.ndarray, seq_length: int, window: int = WINDOW) -> Rows:
    """Pack the samples of `order` (ids into `sizes`, in positions) into rows of `seq_length`.

    Each sample goes where it leaves the least room. Samples that take no position (one token or none) are left out. Rows come
    in the order in which they were opened; within a row, samples keep the order of `order`.
    """
    order = np.asarray(order, dtype=np.int64)
    order = order[sizes[order] > 0]
    rank = _largest_first(sizes[order], seq_length, window)
    row_of = np.empty(len(order), dtype=np.int64)
    row_of[rank] = _rows_of(sizes[order[rank]].tolist(), seq_length)
    by_row = np.argsort(row_of, kind="stable")
    count = int(row_of.max()) + 1 if len(row_of) else 0
    return Rows(order[by_row], np.searchsorted(row_of[by_row], np.arange(count + 1)))


def _largest_first(sizes: np.ndarray, seq_length: int, window: int) -> np.ndarray:
    """Return the order of `sizes`: within each window by decreasing size, equal ones in their order."""
    # Numbers of 16 bits are sorted by their digits, twenty times as fast as longer ones.
    keys = (-sizes).astype(np.int16 if seq_length < 1 << 15 else np.int64)
    ranks = [start + np.argsort(keys[start : start + window], kind="stable") for start in range(0, len(keys), window)]
    return np.concatenate(ranks) if ranks else np.zeros(0, np.int64)


def _rows_of(sizes: list[int], seq_length: int) -> list[int]:
    """Return the row of each sample, for about a million samples per second. The open rows are stored by their free space; one integer has
    a bit for each size of free space that occurs.
    """
    by_room: list[list[int]] = [[] for _ in range(seq_length + 1)]
    rooms = count = 0
    rows = []
    for size in sizes:
        if enough := rooms >> size:
            room = size + (enough & -enough).bit_length() - 1  # the smallest free space that is sufficient
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            row, room = count, seq_length
            count += 1
        if left := room - size:
            by_room[left].append(row)
            rooms |= 1 << left
        rows.append(row)
    return rows


def without_emptiest(rows: Rows, sizes: np.ndarray, seq_length: int) -> tuple[Rows, np.ndarray]:
    """Return (the rows without the emptiest one, the samples of that row); (rows, nothing) if it is nine tenths full or the only one."""
    used = np.add.reduceat(sizes[rows.order], rows.starts[:-1])
    emptiest = int(used.argmin())
    if len(rows) == 1 or used[emptiest] >= 0.9 * seq_length:
        return rows, np.zeros(0, np.int64)
    first, after = rows.starts[emptiest], rows.starts[emptiest + 1]
    order = np.concatenate([rows.order[:first], rows.order[after:]])
    starts = np.concatenate([rows.starts[: emptiest + 1], rows.starts[emptiest + 2 :] - (after - first)])
    return Rows(order, starts), rows.order[first:after]


def shuffled(rows: Rows, rng: np.random.Generator) -> Rows:
    """Return the same rows in another order. Packing puts long samples into the first rows, and training should not begin with those."""
    turn = rng.permutation(len(rows))
    lengths = np.diff(rows.starts)[turn]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    picks = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths) + np.repeat(rows.starts[:-1][turn], lengths)
    return Rows(rows.order[picks], starts)


def fill(rows: Rows, sizes: np.ndarray, seq_length: int) -> float:
    """Return the share of all positions that hold a token, 0 to 1."""
    return float(sizes[rows.order].sum() / max(1, len(rows) * seq_length))

"""Which samples share a row: first fit over a window, deterministic, no torch.

A sample of n tokens takes n - 1 positions of a row (its last token is only ever a label), at most `seq_length` of them.
Positions and attention restart at every sample; that is the loader's and the attention's business, not this file's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WINDOW = 512
"""Rows open at a time. More fills rows better and makes the plan slower."""


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
    """Positions each sample takes in a row: its tokens less one, cut at seq_length."""
    return np.clip(np.asarray(lengths, dtype=np.int64) - 1, 0, seq_length)


def one_per_row(order: np.ndarray) -> Rows:
    """The unpacked plan: every sample alone in its row."""
    return Rows(np.asarray(order, dtype=np.int64), np.arange(len(order) + 1, dtype=np.int64))


def first_fit(order: np.ndarray, sizes: np.ndarray, seq_length: int, window: int = WINDOW) -> Rows:
    """Pack the samples of `order` (ids into `sizes`, in positions) into rows of `seq_length`.

    Each sample goes into the first open row that has room; with `window` rows open and none fitting, the fullest is closed.
    Samples that take no position (one token or none) are left out. Rows come in the order in which they were opened.
    """
    rows: list[list[int]] = []
    room = np.zeros(window, dtype=np.int64)
    slot_row = np.full(window, -1, dtype=np.int64)
    for sample in order:
        size = sizes[sample]
        if size == 0:
            continue
        fits = room >= size
        slot = int(fits.argmax())
        if not fits[slot]:
            slot = int(room.argmin())
            slot_row[slot] = len(rows)
            rows.append([])
            room[slot] = seq_length
        rows[slot_row[slot]].append(int(sample))
        room[slot] -= size
    starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return Rows(np.array([sample for row in rows for sample in row], dtype=np.int64), starts)


def fill(rows: Rows, sizes: np.ndarray, seq_length: int) -> float:
    """Share of all positions that hold a token, 0 to 1."""
    return float(sizes[rows.order].sum() / max(1, len(rows) * seq_length))

"""The pieces of samples in an epoch. Uses only numpy; no tokens are read.

A sample that fits into a row is one piece. A longer one is cut, dropped or split, as set. With shares, each set of shards contributes as
many pieces as its share requires: whole passes over it, and a random part of one more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_ft.errors import DataError

OVER_LONG = ("cut", "drop", "split")


@dataclass(frozen=True)
class Pieces:
    """Piece i is positions start[i] .. start[i] + size[i] of sample[i]; it reads one token more, its last label."""

    sample: np.ndarray
    start: np.ndarray
    size: np.ndarray

    def __len__(self) -> int:
        return len(self.size)


def pieces_of(lengths: np.ndarray, seq_length: int, over_long: str) -> Pieces:
    """Return the pieces of samples of `lengths` tokens in rows of seq_length positions; samples of at most one token have no piece.

    over_long: "cut" keeps the beginning of a long sample, "drop" nothing, "split" all of it in pieces of seq_length.
    """
    positions = np.asarray(lengths, dtype=np.int64) - 1
    count = (positions > 0).astype(np.int64)
    if over_long == "drop":
        count[positions > seq_length] = 0
    elif over_long == "split":
        count = np.maximum(-(-positions // seq_length), 0)
    sample = np.repeat(np.arange(len(positions)), count)
    number = np.arange(len(sample)) - np.repeat(np.cumsum(count) - count, count)
    start = number * seq_length
    return Pieces(sample, start, np.minimum(positions[sample] - start, seq_length))


def pieces_per_epoch(sizes: np.ndarray, shares: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Return how many pieces each set contributes, so that their values have the ratio of `shares`.

    sizes: pieces in each set; value: the average value of its pieces (1, or the number of supervised tokens). An epoch
    stays as long as all sets together.
    """
    wanted = np.divide(shares, value, out=np.zeros(len(shares)), where=value > 0)
    if not wanted.any():
        raise DataError("the sets that have a share have no supervised token: share by samples, or among other sets")
    exact = wanted / wanted.sum() * sizes.sum()
    floor = np.floor(exact).astype(np.int64)
    rest = int(sizes.sum() - floor.sum())
    floor[np.argsort(floor - exact, kind="stable")[:rest]] += 1  # largest remainders
    return floor


def draw(sets: list[np.ndarray], counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the pieces of one epoch, unshuffled: each set as often as its share contains it completely, and a random part for the rest."""
    drawn = []
    for members, count in zip(sets, counts, strict=True):
        passes, part = divmod(int(count), len(members)) if len(members) else (0, 0)
        drawn += [members] * passes + [np.sort(rng.permutation(members)[:part])]
    return np.concatenate(drawn)

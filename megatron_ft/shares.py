"""Divides work by size over ranks: only arithmetic, with the same result on every rank."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def deal(sizes: Sequence[int], ranks: int) -> list[int]:
    """Return the rank that takes each item: the largest first, each to the rank with the smallest sum so far, the lowest such rank.

    No rank gets more than an equal share and one item (Graham 1969).
    """
    heap = [(0, rank) for rank in range(ranks)]
    owners = [0] * len(sizes)
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        load, owners[item] = heap[0]
        heapq.heapreplace(heap, (load + sizes[item], owners[item]))
    return owners

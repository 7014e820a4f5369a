"""Items that a prompt is filled with, drawn one after the other: more of them never change those before."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")
_TRIES = 200
"""Draws in a row that only repeat earlier items, after which there are no others."""


class Supply(Generic[Item]):
    """The items of an iterator, without those whose name was there before."""

    def __init__(self, items: Iterator[Item], name: Callable[[Item], object]):
        self._items, self._name = items, name
        self._drawn: list[Item] = []
        self._names: set[object] = set()

    def first(self, count: int) -> list[Item]:
        """Return the first items: `count`, or all that there are."""
        tries = 0
        while len(self._drawn) < count and tries < _TRIES:
            item = next(self._items, None)
            if item is None:
                break
            tries = 0 if self._keep(item) else tries + 1
        return self._drawn[:count]

    def _keep(self, item: Item) -> bool:
        name = self._name(item)
        is_new = name not in self._names
        if is_new:
            self._names.add(name)
            self._drawn.append(item)
        return is_new


def place_first(items: list[Item], depth: float) -> tuple[list[Item], int]:
    """Return the items with the first one moved to `depth` (0: the start, 1: the end), and its index."""
    index = round(depth * (len(items) - 1))
    return [*items[1 : index + 1], items[0], *items[index + 1 :]], index

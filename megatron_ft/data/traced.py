"""Text that remembers where it comes from: a str whose characters carry labels through what a chat template does with it.

Traced behaves as str does; adding, cutting, stripping, splitting and joining keep the labels. Whatever else is done gives plain text,
which has none. Knows neither templates nor roles.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, SupportsIndex

PLAIN, REASON, CALL, DEFINED, FORGED = range(5)


class Label(NamedTuple):
    """message: whose text it is, None for a template's own and for definitions of tools and documents (kind DEFINED). owner: the
    message in whose turn the template wrote it, with the kind of what it went through there. trained: inside of {% generation %}."""

    message: int | None = None
    kind: int = PLAIN
    owner: int | None = None
    trained: bool = False


OWN = Label()
Runs = tuple[tuple[int, Label], ...]
"""Lengths and labels of stretches of equal labels."""


class Traced(str):
    """A str with labels; made by traced()."""

    runs: Runs

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> str:
        return joined((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> str:
        return joined((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: SupportsIndex) -> str:
        return joined([self] * times.__index__())

    __rmul__ = __mul__

    def __getitem__(self, key: Any) -> str:
        found = str.__getitem__(self, key)
        places = range(len(self))[key]
        if isinstance(places, int):
            return _cut(self, places, places + 1)
        if places.step == 1:
            return _cut(self, places.start, places.stop)
        labels = [label for length, label in self.runs for _ in range(length)]
        return traced(found, [(1, labels[i]) for i in places])

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def strip(self, chars: str | None = None) -> str:
        return Traced.lstrip(_as_traced(Traced.rstrip(self, chars)), chars)

    def lstrip(self, chars: str | None = None) -> str:
        return _cut(self, len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None) -> str:
        return _cut(self, 0, len(str.rstrip(self, chars)))

    def removeprefix(self, prefix: str) -> str:
        return _cut(self, len(self) - len(str.removeprefix(self, prefix)), len(self))

    def removesuffix(self, suffix: str) -> str:
        return _cut(self, 0, len(str.removesuffix(self, suffix)))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return list(_in_order(self, str.split(self, sep, maxsplit), len(sep or "")))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return list(_in_order(self, str.rsplit(self, sep, maxsplit), len(sep or "")))

    def splitlines(self, keepends: bool = False) -> list[str]:
        whole = list(_in_order(self, str.splitlines(self, True), 0))
        return whole if keepends else [_cut(line, 0, len(str.splitlines(line)[0])) for line in whole]

    def partition(self, sep: str) -> tuple[str, str, str]:
        first, middle, last = _in_order(self, str.partition(self, sep), 0)
        return first, middle, last

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        first, middle, last = _in_order(self, str.rpartition(self, sep), 0)
        return first, middle, last

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> str:
        return joined(self.split(old, count), new) if old else _uniform(str.replace(self, old, new, count), self)

    def join(self, parts: Iterable[str]) -> str:
        return joined(list(parts), self)

    def lower(self) -> str:
        return _same_places(str.lower(self), self)

    def upper(self) -> str:
        return _same_places(str.upper(self), self)

    def title(self) -> str:
        return _same_places(str.title(self), self)

    def capitalize(self) -> str:
        return _same_places(str.capitalize(self), self)


class Switch(str):
    """An empty text after which the template writes the turn of another message. depth: of its loop."""

    depth: int
    message: int | None
    kind: int

    def __str__(self) -> str:
        return self


def traced(text: str, runs: Iterable[tuple[int, Label]]) -> str:
    """Return the text with labels; a plain str if all labels are empty."""
    merged: list[tuple[int, Label]] = []
    for length, label in runs:
        if merged and merged[-1][1] == label:
            merged[-1] = (merged[-1][0] + length, label)
        elif length:
            merged.append((length, label))
    if all(label == OWN for _, label in merged):
        return str.__str__(text)[:] if type(text) is str else "".join((text,))
    result = Traced(text)
    result.runs = tuple(merged)
    return result


def labelled(text: str, label: Label) -> str:
    return traced(text, ((len(text), label),))


def switch(depth: int, message: int | None, kind: int = PLAIN) -> Switch:
    result = Switch("")
    result.depth, result.message, result.kind = depth, message, kind
    return result


def runs_of(text: str) -> Runs:
    if isinstance(text, Traced):
        return text.runs
    return ((len(text), OWN),) if text else ()


def label_of(value: Any) -> Label | None:
    """Return the label of most of a text."""
    return max(value.runs)[1] if isinstance(value, Traced) else None


def joined(parts: Iterable[str], between: str = "") -> str:
    parts = list(parts)
    runs = [run for i, part in enumerate(parts) for run in (runs_of(between) if i else ()) + runs_of(part)]
    return traced(str.join(between, parts), runs)


def written(pieces: Iterable[Any]) -> str:
    """Concatenate what a template wrote, and set the owner of each piece."""
    texts: list[str] = []
    runs: list[tuple[int, Label]] = []
    owners: dict[int, tuple[int | None, int]] = {}
    message, kind = None, PLAIN
    for piece in pieces:
        if isinstance(piece, Switch):
            owners = {depth: owner for depth, owner in owners.items() if depth < piece.depth}
            if piece.message is not None:
                owners[piece.depth] = (piece.message, piece.kind)
            message, kind = owners[max(owners)] if owners else (None, PLAIN)
            continue
        texts.append(piece)
        if message is None:
            runs += runs_of(piece)
        else:
            runs += [(length, _owned(label, message, kind)) for length, label in runs_of(piece)]
    return traced("".join(texts), runs)


def _owned(label: Label, message: int, kind: int) -> Label:
    if label.owner is not None:
        return label
    return label._replace(owner=message, kind=label.kind if label.message is not None else label.kind or kind)


def _as_traced(text: str) -> Traced:
    if isinstance(text, Traced):
        return text
    result = Traced(text)
    result.runs = runs_of(text)
    return result


def _cut(text: str, start: int, stop: int) -> str:
    runs, at = [], 0
    for length, label in runs_of(text):
        runs.append((max(0, min(at + length, stop) - max(at, start)), label))
        at += length
    return traced(str.__getitem__(text, slice(start, stop)), runs)


def _in_order(text: Traced, parts: Iterable[str], between: int) -> Iterator[str]:
    """Return consecutive parts of a text, as str's methods return them, with labels."""
    at = 0
    for part in parts:
        at = at if between else str.find(text, part, at)
        yield _cut(text, at, at + len(part))
        at += len(part) + between


def _same_places(changed: str, text: Traced) -> str:
    return traced(changed, text.runs) if len(changed) == len(text) else _uniform(changed, text)


def _uniform(changed: str, text: Traced) -> str:
    return labelled(changed, max(text.runs)[1])

"""Open-Assistant's "dolphin-mix": records with the same system message are joined to conversations of several turns.

The records are shuffled first, as `datasets` does it with the same seed. All records that are taken are kept in memory.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from megatron_ft.errors import DataError
from tools.pretokenizer.chunk import ROWS, Chunk, Faulty
from tools.pretokenizer.fields import Conversation, get_text
from tools.pretokenizer.lines import parse
from tools.pretokenizer.unread import ALL, Unread

Entry = tuple[str, str, str]
"""System message, question, answer."""
KEYS = ("instruction", "input", "output")


@dataclass(frozen=True)
class MixOptions:
    """Selection and joining of records."""

    num_samples: int | None = None
    """Number of records to take; default: all."""
    max_char_len: int = 8000
    """Close a conversation when it has as many characters, system message included."""
    seed: int = 42
    """Seed of the order of records."""


def joined(read: Callable[[], Iterator[Chunk]], options: MixOptions, unread: Counter[str]) -> Iterator[Chunk]:
    """Yield chunks of {"instruction", "conversation"}, as orca-chat has them, after chunks of Faulty for records that cannot be read.

    read: starts reading the records, which happens twice. unread: is set to the keys of records that are not read.
    """
    faulty: list[Chunk] = []
    entries = _taken(read, options, unread, faulty)
    yield from faulty
    number, name = 0, "dolphin-mix"
    rows: list[dict[str, object]] = []
    for system, own in _by_system(entries):
        for part in _conversations(system, own, options.max_char_len):
            rows.append({"instruction": system, "conversation": part})
            if len(rows) == ROWS:
                yield Chunk(name, "conversation", number + 1, None, rows)
                number, rows = number + len(rows), []
    if rows:
        yield Chunk(name, "conversation", number + 1, None, rows)


def _taken(
    read: Callable[[], Iterator[Chunk]], options: MixOptions, unread: Counter[str], faulty: list[Chunk]
) -> list[Entry]:
    """Return the records that are taken, in the shuffled order."""
    count = sum(1 for chunk in read() for _ in parse(chunk, []))
    order = np.random.default_rng(options.seed).permutation(count)[: options.num_samples]
    places = {int(record): place for place, record in enumerate(order)}
    entries: dict[int, Entry] = {}
    seen, index = Unread(dict.fromkeys(KEYS, ALL)), 0
    for chunk in read():
        bad: list[str] = []
        for where, record in parse(chunk, bad):
            place, index = places.get(index), index + 1
            if place is not None:
                seen.add(record)
                try:
                    system, question, answer = (get_text(record, key, where) for key in KEYS)
                    entries[place] = (system, question, answer)
                except DataError as error:
                    bad.append(str(error))
        if bad:
            faulty.append(Chunk(chunk.name, chunk.unit, chunk.first, None, list(map(Faulty, bad))))
    unread.clear()
    unread.update(seen.counted)
    return [entry for _, entry in sorted(entries.items())]


def _by_system(entries: list[Entry]) -> Iterator[tuple[str, list[Entry]]]:
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry[0], []).append(entry)
    yield from sorted(groups.items())


def _conversations(system: str, entries: list[Entry], most: int) -> Iterator[Conversation]:
    turns: Conversation = []
    size = len(system)
    for _, question, answer in entries:
        turns.append({"input": question, "output": answer})
        size += len(question) + len(answer)
        if size >= most:
            yield turns
            turns, size = [], len(system)
    if turns:
        yield turns

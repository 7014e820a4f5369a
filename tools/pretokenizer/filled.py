"""Open-Assistant's `fill_min_length`: records of questions and answers joined to conversations of several turns.

The records are shuffled first, in the original's order for the same seed. All records are kept in memory.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_ft.errors import DataError
from tools.pretokenizer.chunk import ROWS, Chunk, Faulty
from tools.pretokenizer.fields import Conversation, get_text
from tools.pretokenizer.lines import parse
from tools.pretokenizer.published import PublishedOptions
from tools.pretokenizer.unread import ALL, Unread

JOINED = "conversation"  # key of the records that are made here


@dataclass(frozen=True)
class FillOptions(PublishedOptions):
    """Selection and joining of records."""

    fill_min_length: int | None = None
    """Join records in a random order, each conversation until it has more characters than this; default: each record is one."""
    seed: int = 42
    """Seed of that order."""


def filled(
    read: Callable[[], Iterator[Chunk]], columns: tuple[str, str], options: FillOptions, unread: Counter[str]
) -> Iterator[Chunk]:
    """Yield chunks of {JOINED: [{"input", "output"}]}, and of records that are left out or faulty, for the reader to count.

    columns: the keys of question and answer. unread: is set to the keys of records that are not read.
    """
    rows, seen = [], Unread(dict.fromkeys(columns, ALL))
    for chunk in read():
        bad: list[str] = []
        for where, record in parse(chunk, bad):
            seen.add(record)
            rows.append((where, {key: value for key, value in record.items() if key in columns}))
        if bad:
            yield Chunk(chunk.name, chunk.unit, chunk.first, None, list(map(Faulty, bad)))
    unread.clear()
    unread.update(seen.counted)
    random.Random(options.seed).shuffle(rows)
    made = list(_made(rows, columns, options))
    for start in range(0, len(made), ROWS):
        yield Chunk("fill_min_length", "conversation", start + 1, None, made[start : start + ROWS])


def _made(rows: list[tuple[str, dict[str, Any]]], columns: tuple[str, str], options: FillOptions) -> Iterator[Any]:
    turns: Conversation = []
    size = 0
    for where, record in rows:
        question, answer = (record.get(key) for key in columns)
        if not record or options.leaves_out((question, answer), Counter()):
            yield record
            continue
        try:
            question, answer = (get_text(record, key, where) for key in columns)
        except DataError as error:
            yield Faulty(str(error))
            continue
        turns.append({"input": question, "output": answer})
        size += len(question) + len(answer)
        if size > (options.fill_min_length or 0):
            yield {JOINED: turns}
            turns, size = [], 0
    if turns:
        yield {JOINED: turns}

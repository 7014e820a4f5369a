"""The prompts of a measurement: every task at every length and depth, the same for the same seed and tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_ft.errors import DataError
from megatron_ft.evaluation.retrieval.tasks import Ask, Asked, Task

Count = Callable[[str], int]
"""Number of tokens of a prompt with this text, its chat format included."""


@dataclass(frozen=True)
class Grid:
    """What is asked. lengths: tokens of a prompt and its answer. samples: prompts for each task, length and depth."""

    tasks: tuple[Task, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    seed: int


@dataclass(frozen=True)
class Case:
    """One prompt. tokens: its own; length: the one that it was made for."""

    task: Task
    length: int
    depth: float
    text: str
    expected: tuple[str, ...]
    tokens: int


def depths_of(number: int) -> tuple[float, ...]:
    """Return depths from the start of a prompt (0) to its end (1), evenly spaced; for one its middle."""
    return (0.5,) if number == 1 else tuple(n / (number - 1) for n in range(number))


def places(grid: Grid) -> list[tuple[Task, int, float, int]]:
    """Return task, length, depth and number of every prompt."""
    return [
        (task, length, depth, sample)
        for task in grid.tasks
        for length in grid.lengths
        for depth in grid.depths
        for sample in range(grid.samples)
    ]


def make_cases(
    grid: Grid, places: Sequence[tuple[Task, int, float, int]], count: Count, answer_room: int
) -> Iterator[Case]:
    """Yield the prompt of each place. answer_room: tokens of a length that are left for the answer."""
    for task, length, depth, sample in places:
        # What is drawn does not depend on the length or the other tasks: a longer prompt has the same items, and more.
        ask = task.draw(random.Random(f"{grid.seed}/{task.name}/{depth}/{sample}"))
        asked, tokens = fit(ask, depth, length - answer_room, count, f"{task.name} at --lengths {length}")
        yield Case(task, length, depth, asked.text, asked.expected, tokens)


def fit(ask: Ask, depth: float, most: int, count: Count, where: str) -> tuple[Asked, int]:
    """Return the prompt with the largest number of items that has at most `most` tokens, and its tokens.

    Raise DataError if two items are too many, or if all that there are leave the prompt shorter than half of `most`.
    """
    low, high = 2, 4
    best = _sized(ask, low, depth, count)
    if best[1] > most:
        raise DataError(
            f"{where}: two items have {best[1]} tokens and only {most} are left beside the answer: raise --lengths "
            "or lower --max_new_tokens"
        )
    while (tried := _sized(ask, high, depth, count))[1] <= most:
        best = tried
        if tried[0].items < high:  # there are no more
            return _enough(tried, most, where)
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        tried = _sized(ask, middle, depth, count)
        if tried[1] <= most:
            low, best = middle, tried
        else:
            high = middle
    return best


def _sized(ask: Ask, items: int, depth: float, count: Count) -> tuple[Asked, int]:
    asked = ask(items, depth)
    return asked, count(asked.text)


def _enough(tried: tuple[Asked, int], most: int, where: str) -> tuple[Asked, int]:
    if tried[1] < most / 2:
        raise DataError(
            f"{where}: all {tried[0].items} items that there are have {tried[1]} tokens together, {most} are needed: lower "
            "--lengths, give a longer file, or for key-value raise --key_digits"
        )
    return tried

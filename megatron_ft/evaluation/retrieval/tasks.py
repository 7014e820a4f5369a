"""The four tasks: each draws what a prompt contains and asks for one of its parts."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from megatron_ft.evaluation.retrieval import corpus, scorers
from megatron_ft.evaluation.retrieval.corpus import Document, Topic
from megatron_ft.evaluation.retrieval.supply import Supply, place_first

UUID_DIGITS = 32


class Asked(NamedTuple):
    """A prompt, the answers that are right, and the number of items in it."""

    text: str
    expected: tuple[str, ...]
    items: int


Ask = Callable[[int, float], Asked]
"""Prompt with this many items, or all that there are, and the answer at this depth (0 to 1)."""


class Task(Protocol):
    """A kind of question. draw: everything random of one prompt."""

    @property
    def name(self) -> str: ...
    def draw(self, rng: random.Random) -> Ask: ...
    def score(self, answer: str, expected: tuple[str, ...]) -> float: ...


@dataclass(frozen=True)
class KeyValues:
    """The value of one key in a JSON object of random keys and values.

    digits: hexadecimal digits of each; 32 are UUIDs, which the published task has. A small model needs fewer.
    """

    digits: int = UUID_DIGITS
    name: str = "key-value"

    def draw(self, rng: random.Random) -> Ask:
        pairs = Supply(self.pairs(rng), lambda pair: pair[0])

        def ask(count: int, depth: float) -> Asked:
            placed, index = place_first(pairs.first(count), depth)
            key, value = placed[index]
            return Asked(asked_for(placed, key), (value,), len(placed))

        return ask

    def pairs(self, rng: random.Random) -> Iterator[tuple[str, str]]:
        while True:
            yield self._identifier(rng), self._identifier(rng)

    def _identifier(self, rng: random.Random) -> str:
        if self.digits == UUID_DIGITS:
            return str(uuid.UUID(int=rng.getrandbits(128), version=4))
        return f"{rng.getrandbits(4 * self.digits):0{self.digits}x}"

    def score(self, answer: str, expected: tuple[str, ...]) -> float:
        return scorers.holds_value(answer, expected)


_OBJECT = "This JSON object has a value for each key. Find the value of the key that is named below it."


def asked_for(pairs: Sequence[tuple[str, str]], key: str) -> str:
    """Return the prompt; the pairs are printed as in the published task, one a line."""
    listed = ",\n ".join(f'"{name}": "{value}"' for name, value in pairs)
    return f"{_OBJECT}\n\n{{{listed}}}\n\n{question(key)}"


def question(key: str) -> str:
    return f'Key: "{key}"\nCorresponding value:'


@dataclass(frozen=True)
class Lines:
    """The number in one of many lines (LongEval's fine retrieval)."""

    name: str = "lines"

    def draw(self, rng: random.Random) -> Ask:
        lines = Supply(self._lines(rng), lambda line: line[0])

        def ask(count: int, depth: float) -> Asked:
            placed, index = place_first(lines.first(count), depth)
            name, number = placed[index]
            record = "\n".join(f"line {each}: REGISTER_CONTENT is <{content}>" for each, content in placed)
            asked = (
                f"The record ends here. Which number is the REGISTER_CONTENT of line {name}? Answer with the number."
            )
            return Asked(f"{_RECORD}\n\n{record}\n\n{asked}", (str(number),), len(placed))

        return ask

    def _lines(self, rng: random.Random) -> Iterator[tuple[str, int]]:
        while True:
            yield corpus.line_name(rng), rng.randint(1, 50000)

    def score(self, answer: str, expected: tuple[str, ...]) -> float:
        return scorers.last_number(answer, expected)


_RECORD = (
    "Remember the following record. Each of its lines has a name and a number, its REGISTER_CONTENT. After the record you are asked for "
    "the number of one line."
)


@dataclass(frozen=True)
class Topics:
    """The topic of one of several conversations (LongEval's coarse retrieval, which asks for the first: depth 0).

    topics: those of a file; empty: our own.
    """

    topics: tuple[Topic, ...] = ()
    name: str = "topics"

    def draw(self, rng: random.Random) -> Ask:
        drawn = _shuffled(self.topics, rng) if self.topics else corpus.topics(rng)
        topics = Supply(drawn, lambda topic: scorers.normalised(topic.topic))

        def ask(count: int, depth: float) -> Asked:
            placed, index = place_first(topics.first(count), depth)
            record = "\n\n".join(topic.conversation.strip() for topic in placed)
            asked = f"The record ends here. What was the {ordinal(index + 1)} topic? Answer with the name of the topic only."
            return Asked(f"{_TALK}\n\n{record}\n\n{asked}", (placed[index].topic,), len(placed))

        return ask

    def score(self, answer: str, expected: tuple[str, ...]) -> float:
        return scorers.best_subspan(answer, expected)


_TALK = (
    "The following is a record of our conversation about several topics, one after the other. I begin each with the words 'I would like to "
    "discuss the topic of'. Remember the topics: after the record you are asked for one of them."
)


@dataclass(frozen=True)
class Documents:
    """A question that one of several documents answers.

    documents: those of a file; empty: our own.
    """

    documents: tuple[Document, ...] = ()
    name: str = "documents"

    def draw(self, rng: random.Random) -> Ask:
        drawn = self._with_question_first(rng) if self.documents else corpus.documents(rng)
        asked = next(drawn)
        unlike = (each for each in drawn if not _answers(each, asked.answers))
        documents = Supply(_then(asked, unlike), lambda document: (document.title, document.text))

        def ask(count: int, depth: float) -> Asked:
            placed, _ = place_first(documents.first(count), depth)
            listed = "\n".join(f"Document [{n}](Title: {each.title}) {each.text}" for n, each in enumerate(placed, 1))
            text = f"{_SEARCH}\n\n{listed}\n\nQuestion: {asked.question}\nAnswer:"
            return Asked(text, asked.answers, len(placed))

        return ask

    def _with_question_first(self, rng: random.Random) -> Iterator[Document]:
        """Yield a document with a question, then those that its file gives as distractors of it, then all others."""
        asked = rng.choice([each for each in self.documents if each.question])
        yield asked
        yield from asked.distractors
        yield from _shuffled(self.documents, rng)

    def score(self, answer: str, expected: tuple[str, ...]) -> float:
        return scorers.best_subspan(answer, expected)


_SEARCH = "Answer the question from the documents below, in a few words. Only one of them contains the answer."


def _shuffled(items: tuple, rng: random.Random) -> Iterator:
    return iter(rng.sample(items, len(items)))


def _then(first: Document, rest: Iterator[Document]) -> Iterator[Document]:
    yield first
    yield from rest


def _answers(document: Document, answers: tuple[str, ...]) -> bool:
    """Return whether the answer can be read in this document too."""
    text = scorers.normalised(f"{document.title} {document.text}")
    return any(answer and answer in text for answer in map(scorers.normalised, answers))


def ordinal(number: int) -> str:
    """Return 1 as first, 12 as 12th, 21 as 21st."""
    words = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
    if number <= len(words):
        return words[number - 1]
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"

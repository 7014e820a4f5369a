"""The demo's chats, and the questions that are kept out of them.

Every fact can be asked in ten wordings. Of each fact, HELD_OUT wordings (other ones for other facts) never occur in the
training chats: there the model meets the fact in its other wordings, and the wording with other subjects. Such a
question is held out: answering it takes putting the two together. `check_held_out` holds this on the finished files' text.
"""

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ft.demo.facts import TOPICS, Topic

HELD_OUT = 2  # of the ten wordings of a fact
CHATS = 1600
SYSTEM = "Answer in one short sentence."
Chat = dict[str, list[dict[str, str]]]  # {"messages": [{"role", "content"}]}, a line of a JSONL file


@dataclass(frozen=True)
class Question:
    """One fact in one wording."""

    topic: str
    text: str
    answer: str


@dataclass(frozen=True)
class ChatSet:
    """chats: for training, in the order of the file. held_out: questions that occur in none of them."""

    chats: list[Chat]
    held_out: list[Question]
    facts: int


def make_chats(seed: int, chats: int = CHATS, topics: Sequence[Topic] = TOPICS) -> ChatSet:
    """The same for the same arguments, on every machine."""
    rng = random.Random(seed)
    trained: list[Question] = []
    held_out: list[Question] = []
    facts = 0
    for topic in topics:
        for subject, asked in topic.facts.items():
            questions = _questions(topic, subject, asked)
            # Neighbours hold out other wordings, so that each wording is trained with most subjects of its topic.
            kept_out = {(facts * HELD_OUT + i) % len(questions) for i in range(HELD_OUT)}
            held_out += [questions[i] for i in sorted(kept_out)]
            trained += [question for i, question in enumerate(questions) if i not in kept_out]
            facts += 1
    result = ChatSet([_chat(picked, rng) for picked in _draw(trained, chats, rng)], held_out, facts)
    check_held_out(result)
    return result


def check_held_out(made: ChatSet) -> None:
    """Raise AssertionError if a held-out question occurs in a training message, letter case and punctuation aside."""
    seen = {_plain(message["content"]) for chat in made.chats for message in chat["messages"]}
    leaked = [question.text for question in made.held_out if _plain(question.text) in seen]
    assert not leaked, f"{len(leaked)} held-out questions are in the training chats, first: {leaked[0]}"


def as_prompts(questions: Iterable[Question]) -> list[dict[str, Any]]:
    """Lines for `megatron-ft generate`; it carries "expected" and "topic" over to its answers."""
    return [
        {"messages": [{"role": "user", "content": question.text}], "expected": question.answer, "topic": question.topic}
        for question in questions
    ]


def _questions(topic: Topic, subject: str, asked: str) -> list[Question]:
    fill = {"x": subject, "X": subject[0].upper() + subject[1:], "y": asked}
    return [Question(topic.name, wording.format(**fill), topic.answer.format(**fill)) for wording in topic.wordings]


def _draw(questions: list[Question], chats: int, rng: random.Random) -> Iterator[list[Question]]:
    """One to three questions a chat; every question comes up once before any comes up again."""
    deck: list[Question] = []
    for _ in range(chats):
        count = rng.randint(1, 3)
        if len(deck) < count:
            deck += rng.sample(questions, len(questions))
        yield [deck.pop(0) for _ in range(count)]


def _chat(questions: Sequence[Question], rng: random.Random) -> Chat:
    messages = [{"role": "system", "content": SYSTEM}] if rng.random() < 0.2 else []
    for question in questions:
        messages.append({"role": "user", "content": question.text})
        messages.append({"role": "assistant", "content": question.answer})
    return {"messages": messages}


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))

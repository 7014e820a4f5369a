"""The demo's chats, and the held-out questions.

Every fact can be asked in ten wordings. For each fact, HELD_OUT of these wordings do not occur in the training chats; they differ
between facts. The training chats contain the fact in its other wordings, and the held-out wording with other subjects. To answer a
held-out question, the model must combine the two. `check_held_out` verifies this on the text of the finished chats.
"""

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ft.demo.facts import TOPICS, Topic

HELD_OUT = 2  # number of wordings, out of the ten of a fact
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
    """Return the chats and held-out questions, deterministic for given arguments on every machine."""
    rng = random.Random(seed)
    trained: list[Question] = []
    held_out: list[Question] = []
    facts = 0
    for topic in topics:
        for subject, fact in topic.facts.items():
            questions = _questions(topic, subject, fact)
            # Successive facts hold out different wordings, so that each wording is trained with most subjects of its topic.
            held_out_here = {(facts * HELD_OUT + i) % len(questions) for i in range(HELD_OUT)}
            held_out += [questions[i] for i in sorted(held_out_here)]
            trained += [question for i, question in enumerate(questions) if i not in held_out_here]
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
    """Return the lines for `megatron-ft generate`, which copies "expected" and "topic" to its answers."""
    return [
        {"messages": [{"role": "user", "content": question.text}], "expected": question.answer, "topic": question.topic}
        for question in questions
    ]


def _questions(topic: Topic, subject: str, fact: str) -> list[Question]:
    fill = {"x": subject, "X": subject[0].upper() + subject[1:], "y": fact}
    return [Question(topic.name, wording.format(**fill), topic.answer.format(**fill)) for wording in topic.wordings]


def _draw(questions: list[Question], chats: int, rng: random.Random) -> Iterator[list[Question]]:
    """Yield one to three questions per chat. Every question occurs once before any occurs again."""
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

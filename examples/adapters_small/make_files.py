"""The files that a user of Airophin's recipe brings, in small: a base model and two data sets, made of the demo's facts.

python make_files.py OUT_DIR

OUT_DIR/base            a Llama with random weights and 128 positions, in the files of a downloaded model
OUT_DIR/dolphin.jsonl   questions and answers with a system message, in dolphin's keys
OUT_DIR/chats.jsonl     chats, half of them with a context that goes before what the model may know
"""

import json
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_ft.demo.base_model import Shape, write_base_model
from megatron_ft.demo.facts import TOPICS, Topic
from megatron_ft.files import atomic_file

SHAPE = Shape(
    vocab_size=768,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
)
SYSTEMS = ("You are an AI assistant. You are helpful.", "Answer like a teacher.", "Answer in one short sentence.")
UNKNOWN = "The text does not say."


def make_files(out: Path, records: int = 1600, chats: int = 240, seed: int = 1) -> None:
    """Write the three, the same for given arguments on every machine."""
    rng = random.Random(seed)
    dolphin = [dolphin_record(rng) for _ in range(records)]
    chat_set = [context_chat(rng) if i % 2 else plain_chat(rng) for i in range(chats)]
    out.mkdir(parents=True, exist_ok=True)
    write_lines(out / "dolphin.jsonl", dolphin)
    write_lines(out / "chats.jsonl", chat_set)
    write_base_model(out / "base", (text for record in dolphin + chat_set for text in texts(record)), seed, SHAPE)


def dolphin_record(rng: random.Random) -> dict[str, str]:
    question, answer = asked(*drawn(rng), rng)
    return {"instruction": rng.choice(SYSTEMS), "input": question, "output": answer}


def plain_chat(rng: random.Random) -> dict[str, Any]:
    return {"messages": [message for _ in range(rng.randint(1, 3)) for message in turns(*asked(*drawn(rng), rng))]}


def context_chat(rng: random.Random) -> dict[str, Any]:
    """Ask about a text whose facts are wrong elsewhere; one question in four is one that the text does not answer."""
    topic = rng.choice(TOPICS)
    subjects = rng.sample(sorted(topic.facts), 4)
    facts = {subject: rng.choice(sorted(topic.facts.values())) for subject in subjects}
    told, subject = subjects[:3], rng.choice(subjects)
    question, answer = asked(topic, subject, facts[subject], rng)
    text = " ".join(statement(topic, each, facts[each]) for each in told)
    context = {"date": f"2023-0{rng.randint(1, 9)}-12", "url": f"https://example.org/{topic.name}", "text": text}
    user, assistant = turns(question, answer if subject in told else UNKNOWN)
    return {"messages": [{**user, "context": context}, assistant]}


def drawn(rng: random.Random) -> tuple[Topic, str, str]:
    topic = rng.choice(TOPICS)
    subject = rng.choice(sorted(topic.facts))
    return topic, subject, topic.facts[subject]


def asked(topic: Topic, subject: str, fact: str, rng: random.Random) -> tuple[str, str]:
    return rng.choice(topic.wordings).format(x=subject), statement(topic, subject, fact)


def statement(topic: Topic, subject: str, fact: str) -> str:
    return topic.answer.format(x=subject, X=subject[0].upper() + subject[1:], y=fact)


def turns(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def texts(value: Any) -> Iterator[str]:
    """Yield every text of a record, for the tokenizer."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts(part)


def write_lines(path: Path, records: Iterable[Any]) -> None:
    with atomic_file(path, "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    make_files(Path(sys.argv[1]))

"""Drawn chats through the pretokenizer: what is trained on comes back from the shards to the character, or the record is refused by line.

    python benchmarks/fuzz_chats.py --chats 100000 --seed 7
    python benchmarks/fuzz_chats.py --chats 100000 --seed 7 --templates

Chats have any order of roles, lists of parts, reasoning, tool calls, weights and unknown keys; one in ten has a value of another kind in
some place. Each goes through one of the chat formats, with --templates through one of the tokenizers' own templates of
tests/data/templates. Each text holds a character that no other text of its chat holds. What is trained on, decoded, must hold these
characters of the answers with weight, each once, and no others; it must hold the answers in their order.
tests/pretokenizer/test_fuzz.py draws with hypothesis, and more.
"""

import argparse
import json
import random
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_ft.data.chat_format import FORMATS, ChatFormat
from megatron_ft.data.roles import all_weights, weight_table
from megatron_ft.data.shards import ShardWriter, open_shards
from megatron_ft.data.template_options import TemplateOptions
from tests.data.families import DATE, FAMILIES, write
from tests.data.helpers import fast_file
from tools.pretokenizer.chunk import Chunk
from tools.pretokenizer.readers import READERS
from tools.pretokenizer.selection import Selection
from tools.pretokenizer.work import Job, Worker, WorkerSettings

PIECES = ["<|im_end|>", "<think>", "\n", "  ", "é😀", "{{ x }}", "plum", "[INST]", "</s>", "\0", "1 + 1", "USER:"]
PIECES += ["</think>", "<|eot_id|>", "assistant", "<tool_call>"]
ODD: list[Any] = [None, True, 3, -1, 1e300, "x", [], [None], {}, {"a": [1]}]
TAGS = re.compile(r"</?think>")
FIRST_MARK, MARKS = 0x4E00, 20_000  # Chinese characters, none of which is in PIECES
BATCH = 200
REASONING = ("qwen3", "deepseek-r1")  # the templates that have a place for it


class Source:
    """Draws records."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.marks = 0

    def text(self) -> str:
        pieces = self.random.choices(PIECES, k=self.random.randrange(6))
        if self.random.random() < 0.8:
            self.marks += 1
            pieces.insert(self.random.randrange(len(pieces) + 1), chr(FIRST_MARK + self.marks % MARKS))
        return "".join(pieces)

    def roles(self) -> list[str]:
        """Any order of roles, or one that most templates take."""
        if self.random.random() < 0.4:
            known = ["user", "assistant", "assistant", "system", "tool", "context"]
            return self.random.choices(known, k=self.random.randrange(1, 6))
        first = ["system"] if self.random.random() < 0.3 else []
        results = [["tool", "assistant"] * (self.random.random() < 0.2) for _ in range(self.random.randrange(1, 4))]
        return first + [role for more in results for role in ("user", "assistant", *more)]

    def message(self, role: str, answered: bool = False) -> dict[str, Any]:
        """answered: by a tool."""
        draw = self.random
        content: Any = self.text()
        if draw.random() < 0.2:
            content = [{"type": "text", "text": self.text()} for _ in range(draw.randrange(1, 4))]
        result = {"role": role, "content": content}
        if role == "assistant":
            if draw.random() < (0.9 if answered else 0.1):
                result["tool_calls"] = [self.call() for _ in range(draw.choice([1, 1, 1, 2]))]
                result["content"] = draw.choice(["", None, content])
            if draw.random() < 0.2:
                result["reasoning_content"] = self.text()
            if draw.random() < 0.2:
                result["loss"] = draw.choice([True, False])
        if role == "tool":
            result["tool_call_id"] = "call00001"
        if draw.random() < 0.1:
            result[self.text()] = draw.choice(ODD)
        return result

    def call(self) -> dict[str, Any]:
        arguments = {self.text(): self.random.choice([*ODD, self.text()])}
        return {"type": "function", "id": "call00001", "function": {"name": self.text(), "arguments": arguments}}

    def record(self) -> dict[str, Any]:
        roles = self.roles()
        messages = [self.message(role, after == "tool") for role, after in zip(roles, [*roles[1:], None], strict=True)]
        record: dict[str, Any] = {"messages": messages}
        if self.random.random() < 0.1:
            record["tools"] = [
                {"type": "function", "function": {"name": "f", "description": self.text(), "parameters": {}}}
            ]
        if self.random.random() < 0.1:
            one = self.random.choice([record, *record["messages"]])
            one[self.random.choice(["role", "content", "weight", "loss", "tools", "system", "name", "messages"])] = (
                self.random.choice(ODD)
            )
        return record


class Answer(NamedTuple):
    """What an assistant's message says. calls: names, and objects of arguments."""

    reasoning: str
    content: str
    calls: list[tuple[str, Any]]


def answers(record: dict[str, Any]) -> list[Answer]:
    """Return what is trained on of a record that was accepted: the assistant's turns with weight."""
    found = []
    for one in record["messages"]:
        if one.get("role") == "assistant" and one.get("loss") not in (False, 0) and one.get("weight") != 0:
            content = one["content"] or ""
            content = content if isinstance(content, str) else "".join(part["text"] for part in content)
            functions = [call["function"] for call in one.get("tool_calls") or []]
            calls = [(function["name"], function["arguments"]) for function in functions]
            found.append(Answer(one.get("reasoning_content") or "", content, calls))
    return found


def campaign(folder: Path, chats: int, seed: int, templates: bool = False) -> Counter[str]:
    """Return how many chats were accepted and refused. Raise AssertionError for one that is neither, or not what its record says."""
    source, result = Source(seed), Counter[str]()
    job = Job("messages", "messages", READERS["messages"].options(), Selection())
    workers = own_workers(folder, job) if templates else format_workers(folder, job)
    for start in range(0, chats, BATCH):
        records = [source.record() for _ in range(min(BATCH, chats - start))]
        result += _through(workers[start // BATCH % len(workers)], job, records, folder / "x")
    return result


def format_workers(folder: Path, job: Job) -> list[Worker]:
    file = str(fast_file(folder))
    return [
        Worker(WorkerSettings([job], file, chat_format.added_tokens, name, True, "keep", False))
        for name, chat_format in FORMATS.items()
    ]


def own_workers(folder: Path, job: Job) -> list[Worker]:
    """Return a worker for each family's template, over tokenizers in which every text comes back."""
    found = []
    for name in FAMILIES:
        (folder / name).mkdir()
        written = write(name, folder / name, kind="bytes")
        options = TemplateOptions(DATE)
        found.append(Worker(WorkerSettings([job], str(written), (), "tokenizer", True, "keep", False, options)))
    return found


def _through(worker: Worker, job: Job, records: list[dict[str, Any]], prefix: Path) -> Counter[str]:
    """Write the shards of a batch as a run does, each record as a chunk of its own: a chat may become several samples."""
    counts, refused, accepted = [], 0, []
    chunks = [Chunk("x", "line", n, json.dumps(record).encode(), None) for n, record in enumerate(records, 1)]
    counted = [worker.count(job, chunk, encode=number % 8 == 0) for number, chunk in enumerate(chunks)]
    table = weight_table(sorted({weight for one in counted for weight in one.weights}))
    with ShardWriter(prefix, worker.tokenizer.vocab_size, worker.tokenizer.info(), weights=table, parts=True) as writer:
        for number, (record, chunk, count) in enumerate(zip(records, chunks, counted, strict=True), 1):
            done = worker.tokenize(job, chunk, np.ones(int(count.sizes.sum()), np.uint8), table).get(1)
            bad = count.bad + (done.bad if done else [])
            assert all(message.startswith(f"x, line {number}: ") for message in bad), bad
            if count.encodings is not None and done:  # at the first reading, as a run does where it can
                first = count.encodings.divide(np.ones(int(count.sizes.sum()), np.uint8)).get(1)
                assert first is not None and np.array_equal(first.ids, done.ids), record
            refused += len(bad)
            if done and not bad:
                writer.add_many(done.ids, done.role_bytes, done.lengths)
                accepted.append(record)
                counts.append(len(done.lengths))
    shards = open_shards(prefix)
    assert sum(counts) == len(shards), (sum(counts), len(shards))
    weights = shards.loss_weights(all_weights(0, {}))
    trained = iter([shards.tokens(i)[weights[shards.role_bytes(i)] > 0] for i in range(len(shards))])
    for record, samples in zip(accepted, counts, strict=True):
        _check(worker, [worker.tokenizer.decode(next(trained)) for _ in range(samples)], record)
    return Counter(accepted=len(accepted), refused=refused, empty=len(records) - len(accepted) - refused)


def _check(worker: Worker, trained: list[str], record: dict[str, Any]) -> None:
    """Compare what is trained on in the samples of a chat with what its record says."""
    own = not isinstance(worker.chat_format, ChatFormat)
    name = Path(worker.settings.tokenizer).name if own else worker.chat_format.name
    told = (name, record, trained)
    said, text = "", "\n".join(trained)
    for answer in answers(record):
        whole = [*([answer.reasoning] if not own or name in REASONING else []), answer.content]
        for part in TAGS.split("<think>".join(whole)) if own else whole:
            wanted = part.strip() if own or worker.chat_format.strip else part
            assert wanted in text, told
            text = text if own else text[text.index(wanted) + len(wanted) :]
        calls = [called + json.dumps(arguments, ensure_ascii=False) for called, arguments in answer.calls]
        assert all(json.dumps(arguments, ensure_ascii=False) in text for _, arguments in answer.calls), told
        said += "".join([*whole, *calls])
    expected, found = marks_of(said), [marks_of(sample) for sample in trained]
    assert Counter(expected) == Counter(mark for marks in found for mark in marks), told
    assert all(marks == sorted(marks, key=expected.index) for marks in found), told


def marks_of(text: str) -> list[str]:
    return [character for character in text if FIRST_MARK <= ord(character) < FIRST_MARK + MARKS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chats", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--templates", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = campaign(Path(folder), given.chats, given.seed, given.templates)
    print(
        ", ".join(f"{name} {count:,}" for name, count in result.items())
        + ": each came back, or was refused by its line"
    )


if __name__ == "__main__":
    main()

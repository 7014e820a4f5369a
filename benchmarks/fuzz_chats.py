"""Drawn chats through the pretokenizer: what is trained on comes back from the shards to the character, or the record is refused by line.

    python benchmarks/fuzz_chats.py --chats 100000 --seed 7

Chats have any order of roles, lists of parts, reasoning, tool calls, weights and unknown keys; one in ten has a value of another kind in
some place. Each goes through one of the chat formats. The answers with weight are looked up in the decoded text that is trained on, and the
rest of it must be the format's own text and calls. tests/pretokenizer/test_fuzz.py draws with hypothesis, and more.
"""

import argparse
import json
import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ft.data.chat_format import FORMATS
from megatron_ft.data.roles import all_weights, weight_table
from megatron_ft.data.shards import ShardWriter, open_shards
from tests.data.helpers import fast_file
from tools.pretokenizer.chunk import Chunk
from tools.pretokenizer.readers import READERS
from tools.pretokenizer.selection import Selection
from tools.pretokenizer.work import Job, Worker, WorkerSettings

PIECES = ["<|im_end|>", "<think>", "\n", "  ", "é二😀", "{{ x }}", "plum", "[INST]", "</s>", "\0", "1 + 1", "USER:"]
ODD: list[Any] = [None, True, 3, -1, 1e300, "x", [], [None], {}, {"a": [1]}]
BATCH = 200


class Source:
    """Draws records."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def text(self) -> str:
        return "".join(self.random.choices(PIECES, k=self.random.randrange(6)))

    def message(self) -> dict[str, Any]:
        draw = self.random
        role = draw.choice(["user", "assistant", "assistant", "system", "tool", "context"])
        content: Any = self.text()
        if draw.random() < 0.2:
            content = [{"type": "text", "text": self.text()} for _ in range(draw.randrange(1, 4))]
        result = {"role": role, "content": content}
        if role == "assistant":
            if draw.random() < 0.2:
                result["tool_calls"] = [
                    {"function": {"name": self.text(), "arguments": {self.text(): draw.choice(ODD)}}}
                ]
            if draw.random() < 0.2:
                result["reasoning_content"] = self.text()
            if draw.random() < 0.2:
                result["loss"] = draw.choice([True, False])
        if draw.random() < 0.1:
            result[self.text()] = draw.choice(ODD)
        return result

    def record(self) -> dict[str, Any]:
        record = {"messages": [self.message() for _ in range(self.random.randrange(1, 6))]}
        if self.random.random() < 0.1:
            one = self.random.choice([record, *record["messages"]])
            one[self.random.choice(["role", "content", "weight", "loss", "tools", "system", "name", "messages"])] = (
                self.random.choice(ODD)
            )
        return record


def answers(record: dict[str, Any]) -> list[str]:
    """Return what is trained on of a record that was accepted: reasoning and text of the assistant's turns with weight."""
    found = []
    for one in record["messages"]:
        if one.get("role") == "assistant" and one.get("loss") not in (False, 0) and one.get("weight") is None:
            content = one["content"] or ""
            content = content if isinstance(content, str) else "".join(part["text"] for part in content)
            found += [one.get("reasoning_content") or "", content]
    return found


def campaign(folder: Path, chats: int, seed: int) -> Counter[str]:
    """Return how many chats were accepted and refused. Raise AssertionError for one that is neither, or not what its record says."""
    source, result = Source(seed), Counter[str]()
    tokenizer = str(fast_file(folder))
    job = Job("messages", "messages", READERS["messages"].options(), Selection())
    workers = [
        Worker(WorkerSettings([job], tokenizer, chat_format.added_tokens, name, True, "keep", False))
        for name, chat_format in FORMATS.items()
    ]
    for start in range(0, chats, BATCH):
        records = [source.record() for _ in range(min(BATCH, chats - start))]
        result += _through(workers[start // BATCH % len(workers)], job, records, folder / "x")
    return result


def _through(worker: Worker, job: Job, records: list[dict[str, Any]], prefix: Path) -> Counter[str]:
    chunk = Chunk("x", "line", 1, "\n".join(map(json.dumps, records)).encode(), None)
    counted = worker.count(job, chunk)
    table = weight_table(sorted(counted.weights))
    done = worker.tokenize(job, chunk, np.ones(int(counted.sizes.sum()), np.uint8), table)[1]
    with ShardWriter(prefix, worker.tokenizer.vocab_size, worker.tokenizer.info(), weights=table, parts=True) as writer:
        writer.add_many(done.ids, done.role_bytes, done.lengths)
    refused = {int(message.removeprefix("x, line ").split(":")[0]) for message in counted.bad + done.bad}
    kept = [record for number, record in enumerate(records, 1) if number not in refused and record["messages"]]
    shards = open_shards(prefix)
    assert len(kept) == len(shards), (len(kept), len(shards))
    by_role_byte = shards.loss_weights(all_weights(0, {}))
    for i, record in enumerate(kept):
        _check(worker, shards.tokens(i)[by_role_byte[shards.role_bytes(i)] > 0], record)
    return Counter(accepted=len(kept), refused=len(refused), empty=len(records) - len(kept) - len(refused))


def _check(worker: Worker, trained: np.ndarray, record: dict[str, Any]) -> None:
    text = worker.tokenizer.decode(trained)
    for answer in answers(record):
        wanted = answer.strip() if worker.chat_format.strip else answer
        assert wanted in text, (worker.chat_format.name, record, text)
        text = text[text.index(wanted) + len(wanted) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chats", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = campaign(Path(folder), given.chats, given.seed)
    print(
        ", ".join(f"{name} {count:,}" for name, count in result.items())
        + ": each came back, or was refused by its line"
    )


if __name__ == "__main__":
    main()

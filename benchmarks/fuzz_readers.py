"""Feeds damaged input to the readers of shards and chat files: no crash, no hang, no memory beyond what the input is worth.

    python benchmarks/fuzz_readers.py [--index 5000000] [--manifest 2000000] [--lines 3000000]

Each input is a sound one with a few random changes: bytes flipped, set to telling values, cut out, doubled, numbers of the header
replaced; manifests are changed as JSON too and signed anew, so that what lies behind their hash is met. A reader may refuse with an
error of ours or accept; an index that is accepted must be, byte for byte, what the writer writes for it. Anything else that is
raised is a crash; an input that takes more than a second is a hang.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ft.data.chat_format import CHATML
from megatron_ft.data.fingerprint import fingerprint
from megatron_ft.data.manifest import parse_manifest
from megatron_ft.data.mmididx import HEADER, parse_index, write_index
from megatron_ft.errors import UserError
from tools.pretokenizer.duplicates import fingerprints
from tools.pretokenizer.lines import Chunk, parse
from tools.pretokenizer.readers import READERS
from tools.pretokenizer.selection import REFUSALS, in_order, language_fault, refuses

WHERE = Path("fuzzed")
TELLING = [struct.pack("<q", value) for value in (0, -1, 1, 1 << 31, 1 << 62, -(1 << 63), 1 << 40)]
COUNTS = {"index": 5_000_000, "manifest": 2_000_000, "lines": 3_000_000}
HANG = 1.0  # CPU seconds, which other work on the machine does not lengthen


def command(doc: str | None, targets: dict, counts: dict[str, int]) -> None:
    """A campaign as a script. counts: inputs of each target unless a flag of its name says otherwise."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in counts.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name in targets:
        started, before = time.monotonic(), peak()
        found, slowest = fuzz(name, getattr(arguments, name), arguments.seed, targets)
        tally = ", ".join(f"{count:,} {what}" for what, count in sorted(found.items()))
        print(
            f"{name}: {tally}; slowest {slowest * 1e3:.0f} ms, {(peak() - before) / 1e6:.0f} MB more memory, "
            f"{time.monotonic() - started:.0f} s",
            flush=True,
        )


def fuzz(name: str, inputs: int, seed: int = 0, targets: dict | None = None) -> tuple[Counter[str], float]:
    """(how many were refused and accepted, seconds of the slowest). Raises what crashes a reader, and TimeoutError."""
    make, read = (targets or TARGETS)[name]
    rng, found, slowest = random.Random(seed), Counter[str](), 0.0
    for _ in range(inputs):
        data = make(rng)
        started = time.thread_time()
        try:
            read(data)
            found["accepted"] += 1
        except UserError:
            found["refused"] += 1
        except Exception:
            print(f"{name}: {data!r}", file=sys.stderr)
            raise
        if (taken := time.thread_time() - started) > slowest:
            slowest = taken
            if slowest > HANG:
                raise TimeoutError(f"{name}: {data!r} took {taken:.1f} s")
    return found, slowest


def damaged(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, kind = rng.randrange(len(changed) + 1), rng.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(changed):
            changed[at] = rng.choice((0, 255, 127, 34, 10, 92, 91, 123, rng.randrange(256)))
        elif kind == 2:
            del changed[at : at + rng.randrange(1, 20)]
        elif kind == 3:
            changed[at:at] = changed[at : at + rng.randrange(1, 20)]
        elif kind == 4:
            changed[at : at + 8] = rng.choice(TELLING)
        else:
            del changed[at:]
    return bytes(changed)


def make_index(rng: random.Random) -> bytes:
    data = damaged(rng, rng.choice(INDEXES))
    if rng.randrange(3) == 0:  # a header whose numbers agree with the length, whatever they say
        count = rng.choice((0, 1, 2, 3, max(0, (len(data) - HEADER.size - 8) // 20)))
        data = HEADER.pack(b"MMIDIDX\0\0", 1, rng.choice((1, 4, 5, 8, 8, 8)), count, count + 1) + data[HEADER.size :]
    return data


def read_index(data: bytes) -> None:
    dtype, lengths = parse_index(data, WHERE)
    again = io.BytesIO()
    write_index(again, lengths, dtype)
    assert again.getvalue() == data, "accepted though no writer writes it"


def make_manifest(rng: random.Random) -> bytes:
    if rng.randrange(2):
        return damaged(rng, MANIFEST)
    content = json.loads(MANIFEST)
    content.pop("digest")
    version = content.pop("format_version")
    change_json(rng, content)
    return json.dumps({"format_version": version, **content, "digest": fingerprint(content)}).encode()


def make_lines(rng: random.Random) -> tuple[str, bytes]:
    name, line = rng.choice(LINES)
    if rng.randrange(2):
        return name, damaged(rng, line)
    content = json.loads(line)
    change_json(rng, content)
    return name, json.dumps(content).encode()


def change_json(rng: random.Random, content: dict) -> None:
    """Put something else in a few places, or nothing."""
    for _ in range(rng.choice((1, 1, 2))):
        place = content
        while place:
            key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
            if not place[key] or not isinstance(place[key], dict | list) or rng.randrange(3) == 0:
                break
            place = place[key]
        if not place:
            continue
        if rng.randrange(5) == 0:
            del place[key]
        else:
            place[key] = json.loads(rng.choice(OTHERS))


def read_lines(data: tuple[str, bytes]) -> None:
    """As the pretokenizer reads a record; a bad record in a chunk must not keep it from the next."""
    name, line = data
    chunk = Chunk("fuzzed", "line", 1, line + b"\n{}\n", None)
    bad: list[str] = []
    records = list(parse(chunk, bad))
    assert records and records[-1][1] == {}, "the sound record that follows was lost"
    reader = READERS[name]
    for where, record in records[:-1]:
        language_fault(record, frozenset(["en"]))
        chats = reader.convert(record, where, reader.options(), Counter())
        for chat in chats:
            mended, _ = in_order(chat, "repair")
            refuses(mended, REFUSALS)
            if name != "text":
                CHATML.text(chat)
        fingerprints(chats)
    if bad:
        raise UserError(bad[0])


def _indexes() -> list[bytes]:
    result = []
    for lengths in ([], [3], [3, 1, 2], list(range(1, 60))):
        for dtype in (np.uint16, np.uint8, np.int32):
            file = io.BytesIO()
            write_index(file, np.array(lengths, np.int64), np.dtype(dtype))
            result.append(file.getvalue())
    return result


def _manifest() -> bytes:
    from tempfile import TemporaryDirectory

    from benchmarks.shard_flips import write

    with TemporaryDirectory() as folder:
        write(Path(folder) / "x", np.random.default_rng(0))
        return (Path(folder) / "x-manifest.json").read_bytes()


def peak() -> int:
    """Bytes of memory this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


OTHERS = (
    "null",
    "true",
    "-1",
    "0",
    "1.5",
    "1e400",
    str(1 << 70),
    '""',
    '"x"',
    '"\\u0000"',
    "[]",
    "{}",
    "[[]]",
    '{"a": []}',
    "NaN",
)
CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "q", "context": "c", "weight": 0.5}]
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "a"}], "tool_calls": [CALL]}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
REPLY = {
    "role": "assistant",
    "text": "a",
    "lang": "en",
    "review_result": True,
    "deleted": False,
    "rank": 0,
    "replies": [],
}
PROMPT = {**REPLY, "role": "prompter", "text": "q", "replies": [REPLY, {**REPLY, "rank": 1, "synthetic": True}]}
RECORDS = {
    "messages": {"messages": [*CHAT, ANSWER, {"role": "tool", "content": "1"}], "tools": [TOOL], "lang": "en"},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 2}]},
    "alpaca": {"instruction": "q", "input": "x", "output": "a"},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "text": {"text": "a document"},
    "megacode2": {"USER": "q", "ASSISTANT": "a"},
    "oa_leet10k": {"INSTRUCTION": "q", "RESPONSE": "a"},
    "orca-chat": {"instruction": "s", "conversation": [{"input": "q", "output": "a"}, {"input": "r", "output": "b"}]},
    "dolly15k_multilingual": {
        "instruction": "q",
        "context": "x [1] y[citation needed] [b]",
        "response": "a",
        "lang": "en",
    },
    "dolphin": {"instruction": "s", "input": "q", "output": "a"},
    "oasst_export": {"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": PROMPT},
}
INDEXES, MANIFEST = _indexes(), _manifest()
LINES = [(name, json.dumps(record).encode()) for name, record in RECORDS.items()]
TARGETS: dict[str, tuple[Callable, Callable]] = {
    "index": (make_index, read_index),
    "manifest": (make_manifest, lambda data: parse_manifest(data, WHERE)),
    "lines": (make_lines, read_lines),
}

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    command(__doc__, TARGETS, COUNTS)

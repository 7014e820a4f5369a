"""Keys of a record that its reader does not know, so that nothing in a file is left out in silence.

A reader's `reads` says what it knows: {key: ALL} for a value that is read whole, {key: {...}} for the known keys of an object, or of the
objects in a list. Keys without a value (null) say nothing and are not counted.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from megatron_ft.data.chat_format import ChatFormat
from tools.pretokenizer import messages, pairs

Reads = Mapping[str, Any]
ALL: Reads = {}  # empty: every key below is read
MOST = 1000  # different keys that are counted by name; of a file whose keys are data there is no end
OTHERS = "other keys"
SHOWN = 12

FUNCTION: Reads = {"name": ALL, "arguments": ALL}
CALL: Reads = {**FUNCTION, "id": ALL, "type": ALL, "function": FUNCTION}
PART: Reads = {"type": ALL, "text": ALL}
MESSAGE: Reads = {
    **dict.fromkeys(("role", "from", "context", "weight", "loss", "train", "tool_call_id", "name"), ALL),
    **dict.fromkeys(messages.REASONING, ALL),
    **dict.fromkeys(("content", "value"), PART),
    **dict.fromkeys(("tool_calls", "function_call"), CALL),
}
BESIDE: Reads = dict.fromkeys((*messages.SYSTEM, "tools", "functions"), ALL)
"""What is read beside a list of messages."""
LANGUAGE: Reads = {"lang": ALL, "language": ALL}


def chat_reads(key: str) -> Reads:
    return {key: MESSAGE, **BESIDE}


def pair_reads(shape: pairs.Pair) -> Reads:
    sides = {key: MESSAGE for key in (*shape.question, shape.answer, shape.history)}
    return {**dict.fromkeys(shape.optional, ALL), shape.context: ALL, **sides}


def count_unread(record: dict[str, Any], reads: Reads, counted: Counter[str]) -> None:
    """Add the record's unknown keys to the counts, each with its path: `id`, `messages.name`."""
    _walk(record, reads, "", counted)


def _walk(value: Any, reads: Reads, path: str, counted: Counter[str]) -> None:
    if isinstance(value, list):
        for item in value:
            if isinstance(item, dict) and not (len(item) == 2 and type(item.get("content")) is str and "role" in item):
                _walk(item, reads, path, counted)
    elif isinstance(value, dict):
        for key, inner in value.items():
            known = reads.get(key)
            if known is None:
                if inner is not None:
                    _add(path + key, counted)
            elif known and isinstance(inner, list | dict):
                _walk(inner, known, f"{path}{key}.", counted)


def _add(name: str, counted: Counter[str]) -> None:
    counted[name if name in counted or len(counted) < MOST else OTHERS] += 1


def merge(counted: Counter[str], more: Counter[str]) -> None:
    """Add a chunk's counts to a dataset's."""
    for name, count in more.items():
        counted[name if name in counted or len(counted) < MOST else OTHERS] += count


def not_written(chat_format: Any) -> tuple[str, ...]:
    """Return what a turn may say that a chat format has no place for. A tokenizer's own template is given everything."""
    return ("name",) if isinstance(chat_format, ChatFormat) else ()


def count_unwritten(chat: list[dict[str, Any]], keys: tuple[str, ...], counted: Counter[str]) -> None:
    """Add what the turns say under these keys, which no shard will hold."""
    for turn in chat:
        if len(turn) > 2:
            for key in keys:
                if key in turn:
                    _add(f"a message's {key}", counted)


def line(counted: Counter[str]) -> str:
    """Return the counts as one line, the most frequent first."""
    ordered = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{_printable(name)} ({count:,})" for name, count in ordered[:SHOWN])
    more = len(ordered) - SHOWN
    return f"{shown}, and {more} more" if more > 0 else shown


def _printable(name: str) -> str:
    short = name if len(name) <= 60 else name[:60] + "..."
    return short if short.isprintable() else ascii(short)

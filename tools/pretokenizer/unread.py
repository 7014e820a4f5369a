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
LANGUAGE: Reads = {"lang": ALL, "language": ALL}


def chat_reads(key: str) -> Reads:
    return {key: MESSAGE, **dict.fromkeys(messages.BESIDE, ALL)}


def pair_reads(shape: pairs.Pair) -> Reads:
    sides = {key: MESSAGE for key in (*shape.question, shape.answer, shape.history)}
    return {**dict.fromkeys(shape.optional, ALL), shape.context: ALL, **sides}


class Unread:
    """Counts keys that a reader does not know, each with its path: `id`, `messages.name`."""

    def __init__(self, reads: Reads):
        self.counted: Counter[str] = Counter()
        self._reads = reads
        self._plans: dict[tuple[str, ...], Any] = {}

    def add(self, record: dict[str, Any]) -> None:
        """Count the unknown keys of a record. Records mostly have the same keys, for which is looked up what there is to do."""
        keys = tuple(record)
        if (plan := self._plans.get(keys)) is None:
            plan = (
                [key for key in keys if key not in self._reads],
                [(key, known, f"{key}.") for key in keys if (known := self._reads.get(key))],
            )
            if len(self._plans) < MOST:
                self._plans[keys] = plan
        unknown, inside = plan
        for key in unknown:
            if record[key] is not None:
                _add(key, self.counted)
        for key, known, path in inside:
            if type(value := record[key]) is not str:
                _walk(value, known, path, self.counted)


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


def written(reads: Reads, chat_format: Any) -> Reads:
    """Return what is read and has a place in a chat format: formats of ours have none for names, a tokenizer's own template for what
    it writes nowhere."""
    if isinstance(chat_format, ChatFormat):
        missing: set[str] = {"name", "documents"}
    else:
        names = {"name": ("name",), "reasoning_content": messages.REASONING, "tools": ("tools", "functions")}
        names |= {"documents": ("documents",)}
        missing = {key for place, keys in names.items() if place not in chat_format.places for key in keys}
    without = {key: known for key, known in MESSAGE.items() if key not in missing}
    kept = {key: known for key, known in reads.items() if key not in missing & messages.BESIDE}
    return {
        key: _Known({**without, **_others(known)}, missing, chat_format) if "tool_call_id" in known else known
        for key, known in kept.items()
    }


class _Known(dict[str, Reads]):
    """What is known of a message, with the keys that a tokenizer's own template takes notice of."""

    def __init__(self, known: Reads, missing: set[str], chat_format: Any):
        super().__init__(known)
        self._missing = missing
        self._template = None if isinstance(chat_format, ChatFormat) else chat_format

    def get(self, key: str, default: Any = None) -> Any:
        if key in self or self._template is None or key in self._missing:
            return super().get(key, default)
        return ALL if self._template.reads(key) else default


def _others(known: Reads) -> Reads:
    return {key: value for key, value in known.items() if key not in MESSAGE}


def line(counted: Counter[str]) -> str:
    """Return the counts as one line, the most frequent first."""
    ordered = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{_printable(name)} ({count:,})" for name, count in ordered[:SHOWN])
    more = len(ordered) - SHOWN
    return f"{shown}, and {more} more" if more > 0 else shown


def _printable(name: str) -> str:
    short = name if len(name) <= 60 else name[:60] + "..."
    return short if short.isprintable() and short.strip(" .") else ascii(short)

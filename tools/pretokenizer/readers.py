"""The shapes of chat data, one Reader each: from a record of a file to the conversations in it.

A new shape is a function and a row in READERS. Where a file lies and how it is packed is lines.py's business.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ft.data.roles import ROLES
from megatron_ft.errors import ConfigError, DataError
from tools.pretokenizer.lines import records
from tools.pretokenizer.oasst import OasstOptions, conversations

Conversation = list[dict[str, str]]  # {"role", "content"}


@dataclass(frozen=True)
class NoOptions:
    """A reader without keys of its own."""


@dataclass(frozen=True)
class Reader:
    """convert: (record, where, options, left_out) -> conversations that stay on one side of the train/val split.

    keys: a record is of this shape if it has all of these. options: a dataclass of the reader's own configuration keys.
    """

    name: str
    keys: tuple[str, ...]
    convert: Callable[[dict[str, Any], str, Any, Counter[str]], list[Conversation]]
    options: type = NoOptions


def recognise(path: Path) -> Reader:
    """The reader for a file, from its first record. Raises DataError naming the shapes there are."""
    where, record = next(iter(records(path)), (str(path), None))
    if record is None:
        raise DataError(f"{path}: holds no chats; write one JSON object a line")
    for reader in READERS.values():
        if all(key in record for key in reader.keys):
            return reader
    shapes = "; ".join(f"{reader.name}: {', '.join(reader.keys)}" for reader in READERS.values())
    raise DataError(f"{where}: no known shape has the keys {', '.join(record) or '(none)'} (known: {shapes})")


def get_reader(name: str) -> Reader:
    """A reader by the name used in configurations."""
    if name not in READERS:
        raise ConfigError(f"unknown dataset '{name}': choose one of {', '.join(READERS)}")
    return READERS[name]


def _messages(record: dict[str, Any], where: str, options: NoOptions, left_out: Counter[str]) -> list[Conversation]:
    """{"messages": [{"role", "content"}]}; a message's "context" becomes a turn of its own before it."""
    messages = _list(record, "messages", where)
    return _keep([turn for message in messages for turn in _message_turns(message, where)], left_out)


def _message_turns(message: Any, where: str) -> Conversation:
    if not isinstance(message, dict):
        raise DataError(f"{where}: a message is {type(message).__name__}, not an object with role and content")
    role = _text(message, "role", where)
    if role not in ROLES:
        raise DataError(f"{where}: unknown role {role!r}; the roles are {', '.join(ROLES)}")
    turn = {"role": role, "content": _text(message, "content", where)}
    return (
        [{"role": "context", "content": _text(message, "context", where)}, turn] if message.get("context") else [turn]
    )


_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def _sharegpt(record: dict[str, Any], where: str, options: NoOptions, left_out: Counter[str]) -> list[Conversation]:
    """{"conversations": [{"from": "human"|"gpt"|"system", "value"}]}"""
    turns = []
    for message in _list(record, "conversations", where):
        speaker = _text(message, "from", where)
        if speaker not in _SHAREGPT_ROLES:
            raise DataError(f"{where}: unknown speaker {speaker!r}; the speakers are {', '.join(_SHAREGPT_ROLES)}")
        turns.append({"role": _SHAREGPT_ROLES[speaker], "content": _text(message, "value", where)})
    return _keep(turns, left_out)


def _alpaca(record: dict[str, Any], where: str, options: NoOptions, left_out: Counter[str]) -> list[Conversation]:
    """{"instruction", "input" (may be missing or empty), "output"}; instruction and input with an empty line
    between."""
    question = [_text(record, "instruction", where)]
    if record.get("input"):
        question.append(_text(record, "input", where))
    return _pair("\n\n".join(question), _text(record, "output", where), left_out)


def _prompt_completion(
    record: dict[str, Any], where: str, options: NoOptions, left_out: Counter[str]
) -> list[Conversation]:
    """{"prompt", "completion"}"""
    return _pair(_text(record, "prompt", where), _text(record, "completion", where), left_out)


def _pair(question: str, answer: str, left_out: Counter[str]) -> list[Conversation]:
    return _keep([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], left_out)


def _keep(turns: Conversation, left_out: Counter[str]) -> list[Conversation]:
    if not turns:
        left_out["chat without messages"] += 1
    return [turns] if turns else []


def _get(record: Any, key: str, where: str) -> Any:
    if not isinstance(record, dict) or key not in record:
        raise DataError(f"{where}: no '{key}' in it; see docs/pretokenizer.md for the shapes of chat files")
    return record[key]


def _list(record: Any, key: str, where: str) -> list[Any]:
    value = _get(record, key, where)
    if not isinstance(value, list):
        raise DataError(f"{where}: '{key}' is {type(value).__name__}, not a list; see docs/pretokenizer.md")
    return value


def _text(record: Any, key: str, where: str) -> str:
    value = _get(record, key, where)
    if not isinstance(value, str):
        raise DataError(f"{where}: '{key}' is {type(value).__name__}, not text; write it as a string")
    return value


def _table(readers: Iterable[Reader]) -> dict[str, Reader]:
    return {reader.name: reader for reader in readers}


READERS = _table(
    [
        Reader("oasst_export", ("message_tree_id", "prompt"), conversations, OasstOptions),
        Reader("messages", ("messages",), _messages),
        Reader("sharegpt", ("conversations",), _sharegpt),
        Reader("alpaca", ("instruction", "output"), _alpaca),
        Reader("prompt_completion", ("prompt", "completion"), _prompt_completion),
    ]
)

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
from tools.pretokenizer import named, toolcalls
from tools.pretokenizer.fields import Conversation, get_list, get_text, keep, pair, weight_of
from tools.pretokenizer.lines import records
from tools.pretokenizer.oasst import OasstOptions, conversations
from tools.pretokenizer.places import files_of


@dataclass(frozen=True)
class NoOptions:
    """A reader without keys of its own."""


@dataclass(frozen=True)
class Reader:
    """convert: (record, where, options, left_out) -> conversations that stay on one side of the train/val split.

    keys: a record is of this shape if it has all of these; none for a shape that only its name tells. options: a
    dataclass of the reader's own configuration keys. repositories: what a published dataset is called. marked: share of
    the samples whose text is marked for language-modelling loss where the configuration says nothing.
    """

    name: str
    keys: tuple[str, ...]
    convert: Callable[[dict[str, Any], str, Any, Counter[str]], list[Conversation]]
    options: type = NoOptions
    repositories: tuple[str, ...] = ()
    marked: float = 0.0


def recognise(path: Path) -> Reader:
    """The reader for a file or a folder, from its first record. Raises DataError naming the shapes there are."""
    first = files_of(path)[0]
    where, record = next(iter(records(first)), (str(first), None))
    if record is None:
        raise DataError(f"{first}: holds no chats; write one JSON object a line")
    for reader in READERS.values():
        if reader.keys and all(key in record for key in reader.keys):
            return reader
    shapes = "; ".join(f"{reader.name}: {', '.join(reader.keys)}" for reader in READERS.values() if reader.keys)
    raise DataError(f"{where}: no known shape has the keys {', '.join(record) or '(none)'} (known: {shapes})")


def get_reader(name: str) -> Reader:
    """A reader by the name used in configurations."""
    if name not in READERS:
        raise ConfigError(f"unknown dataset '{name}': choose one of {', '.join(READERS)}")
    return READERS[name]


def _messages(record: dict[str, Any], where: str, options: NoOptions, left_out: Counter[str]) -> list[Conversation]:
    """{"messages": [{"role", "content"}], "tools"}, as OpenAI's chats; a message's "context" becomes a turn of its own before it,
    its "weight" and its "tool_calls" are carried."""
    messages = get_list(record, "messages", where)
    turns = [turn for message in messages for turn in _message_turns(message, where)]
    return keep(toolcalls.with_tools(turns, record, where), left_out)


def _message_turns(message: Any, where: str) -> Conversation:
    if isinstance(message, dict) and len(message) == 2:  # as nearly all are, and there are many
        role, content = message.get("role"), message.get("content")
        if isinstance(role, str) and role in ROLES and isinstance(content, str):
            return [message]
    if not isinstance(message, dict):
        raise DataError(f"{where}: a message is {type(message).__name__}, not an object with role and content")
    role = _OTHER_NAMES.get(name := get_text(message, "role", where), name)
    if role not in ROLES:
        raise DataError(f"{where}: unknown role {role!r}; the roles are {', '.join(ROLES)}")
    calls = toolcalls.carried(message, where)
    content = _content(message, where, bool(calls))
    turn = {"role": role, "content": content, **weight_of(message, where), **calls}
    if not message.get("context"):
        return [turn]
    return [{"role": "context", "content": get_text(message, "context", where)}, turn]


_OTHER_NAMES = {"developer": "system", "function": "tool"}  # of OpenAI's interfaces, later and earlier


def _content(message: dict[str, Any], where: str, may_be_empty: bool) -> str:
    """A message's text: a string, OpenAI's list of parts, or nothing beside the calls of tools."""
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise DataError(f"{where}: a message has a part of type {kind}; only text can be tokenized")
        return "".join(get_text(part, "text", where) for part in content)
    return "" if content is None and may_be_empty else get_text(message, "content", where)


_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}


def _sharegpt(record: dict[str, Any], where: str, options: NoOptions, left_out: Counter[str]) -> list[Conversation]:
    """{"conversations": [{"from": "human"|"gpt"|"system"|"tool"|"function_call", "value"}], "tools"}"""
    turns = []
    for message in get_list(record, "conversations", where):
        speaker = get_text(message, "from", where)
        if speaker not in _SHAREGPT_ROLES:
            raise DataError(f"{where}: unknown speaker {speaker!r}; the speakers are {', '.join(_SHAREGPT_ROLES)}")
        content = get_text(message, "value", where)
        turn = {"role": _SHAREGPT_ROLES[speaker], "content": content, **weight_of(message, where)}
        turns.append(toolcalls.said_as_json(turn, where) if speaker == "function_call" else turn)
    return keep(toolcalls.with_tools(turns, record, where), left_out)


def _alpaca(record: dict[str, Any], where: str, options: NoOptions, left_out: Counter[str]) -> list[Conversation]:
    """{"instruction", "input" (may be missing or empty), "output"}; instruction and input with an empty line
    between."""
    question = [get_text(record, "instruction", where)]
    if record.get("input"):
        question.append(get_text(record, "input", where))
    return pair("\n\n".join(question), get_text(record, "output", where), left_out)


def _prompt_completion(
    record: dict[str, Any], where: str, options: NoOptions, left_out: Counter[str]
) -> list[Conversation]:
    """{"prompt", "completion"}"""
    return pair(get_text(record, "prompt", where), get_text(record, "completion", where), left_out)


def _text(record: dict[str, Any], where: str, options: NoOptions, left_out: Counter[str]) -> list[Conversation]:
    """{"text"}, or a whole .txt file: one document, in no chat format."""
    text = get_text(record, "text", where)
    return keep([{"role": "text", "content": text}] if text else [], left_out)


def _table(readers: Iterable[Reader]) -> dict[str, Reader]:
    return {reader.name: reader for reader in readers}


# In the order in which they are tried on a file that nobody named.
READERS = _table(
    [
        Reader("oasst_export", ("message_tree_id", "prompt"), conversations, OasstOptions),
        Reader("messages", ("messages",), _messages),
        Reader("sharegpt", ("conversations",), _sharegpt),
        Reader(
            *("orca-chat", ("instruction", "conversation"), named.orca_chat),
            repositories=("shahules786/orca-chat",),
        ),
        Reader(
            *("dolly15k_multilingual", ("instruction", "context", "response"), named.dolly15k, named.DollyOptions),
            repositories=("argilla/databricks-dolly-15k-curated-multilingual",),
        ),
        Reader("alpaca", ("instruction", "output"), _alpaca),
        Reader("prompt_completion", ("prompt", "completion"), _prompt_completion),
        Reader(
            *("megacode2", ("USER", "ASSISTANT"), named.megacode2),
            repositories=("rombodawg/LosslessMegaCodeTrainingV2_1m_Evol_Uncensored",),
        ),
        Reader(
            *("oa_leet10k", ("INSTRUCTION", "RESPONSE"), named.oa_leet10k),
            repositories=("ehartford/oa_leet10k",),
        ),
        Reader("dolphin", (), named.dolphin, repositories=("ehartford/dolphin",)),  # alpaca's keys, otherwise meant
        Reader("text", ("text",), _text, marked=1.0),
    ]
)

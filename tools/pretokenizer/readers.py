"""The formats of chat data, one Reader each: from a record of a file to conversations.

A new format is a function and a row in READERS. lines.py reads the files.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ft.data.roles import ROLES
from megatron_ft.errors import ConfigError, DataError
from tools.pretokenizer import named, toolcalls
from tools.pretokenizer.dolphin_mix import MixOptions
from tools.pretokenizer.fields import Conversation, get_list, get_text, keep, pair, weight_of
from tools.pretokenizer.lines import records
from tools.pretokenizer.oasst import OasstOptions, conversations
from tools.pretokenizer.places import files_of
from tools.pretokenizer.published import PublishedOptions


@dataclass(frozen=True)
class NoOptions:
    """The options of a reader without keys of its own."""


@dataclass(frozen=True)
class Reader:
    """One format. convert: (record, where, options, left_out) -> conversations, which stay on one side of the train/val split.

    keys: a record with all these keys has this format; empty for a format that must be named. options: a dataclass of the reader's
    own configuration keys. repositories: names of published datasets. marked: default share of the samples whose text is marked for
    language-modelling loss. data_files: the file of the repository that is read, if it is there. splits: that are read. val_rounding:
    default of this key.
    """

    name: str
    keys: tuple[str, ...]
    convert: Callable[[dict[str, Any], str, Any, Counter[str]], list[Conversation]]
    options: type = NoOptions
    repositories: tuple[str, ...] = ()
    marked: float = 0.0
    data_files: str | None = None
    splits: str = "train"
    val_rounding: str = "down"


def recognise(path: Path) -> Reader:
    """Return the reader for a file or a folder, from its first record. Raise DataError with the known formats."""
    first = files_of(path)[0]
    where, record = next(iter(records(first)), (str(first), None))
    if record is None:
        raise DataError(f"{first}: contains no chats; write one JSON object per line")
    for reader in READERS.values():
        if reader.keys and all(key in record for key in reader.keys):
            return reader
    formats = "; ".join(f"{reader.name}: {', '.join(reader.keys)}" for reader in READERS.values() if reader.keys)
    raise DataError(f"{where}: no known format has the keys {', '.join(record) or '(none)'} (known: {formats})")


def get_reader(name: str) -> Reader:
    """Return a reader by its name in configurations. Raise ConfigError for an unknown name."""
    if name not in READERS:
        raise ConfigError(f"unknown dataset '{name}': choose one of {', '.join(READERS)}")
    return READERS[name]


def _messages(record: dict[str, Any], where: str, options: NoOptions, left_out: Counter[str]) -> list[Conversation]:
    """Read {"messages": [{"role", "content"}], "tools"}, OpenAI's format. A message's "context" becomes a separate turn before it; its
    "weight" and "tool_calls" are kept."""
    messages = get_list(record, "messages", where)
    turns = [turn for message in messages for turn in _message_turns(message, where)]
    return keep(toolcalls.with_tools(turns, record, where), left_out)


def _message_turns(message: Any, where: str) -> Conversation:
    if isinstance(message, dict) and len(message) == 2:  # the common case, which must be fast
        role, content = message.get("role"), message.get("content")
        if isinstance(role, str) and role in ROLES and isinstance(content, str):
            return [message]
    if not isinstance(message, dict):
        raise DataError(f"{where}: a message is {type(message).__name__}, not an object with role and content")
    role = _OTHER_NAMES.get(name := get_text(message, "role", where), name)
    if role not in ROLES:
        raise DataError(f"{where}: unknown role {role!r}; use one of {', '.join(ROLES)}")
    calls = toolcalls.tool_keys(message, where)
    content = _content(message, where, bool(calls))
    turn = {"role": role, "content": content, **weight_of(message, where), **calls}
    if not message.get("context"):
        return [turn]
    return [{"role": "context", "content": get_text(message, "context", where)}, turn]


_OTHER_NAMES = {"developer": "system", "function": "tool"}  # other names in OpenAI's APIs


def _content(message: dict[str, Any], where: str, may_be_empty: bool) -> str:
    """Return a message's text: from a string or OpenAI's list of parts; it may be missing beside tool calls."""
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
    """Read {"conversations": [{"from": "human"|"gpt"|"system"|"tool"|"function_call", "value"}], "tools"}."""
    turns = []
    for message in get_list(record, "conversations", where):
        name = get_text(message, "from", where)
        if name not in _SHAREGPT_ROLES:
            raise DataError(f"{where}: unknown role {name!r} in 'from'; use one of {', '.join(_SHAREGPT_ROLES)}")
        content = get_text(message, "value", where)
        turn = {"role": _SHAREGPT_ROLES[name], "content": content, **weight_of(message, where)}
        turns.append(toolcalls.from_json_text(turn, where) if name == "function_call" else turn)
    return keep(toolcalls.with_tools(turns, record, where), left_out)


def _alpaca(record: dict[str, Any], where: str, options: NoOptions, left_out: Counter[str]) -> list[Conversation]:
    """Read {"instruction", "input" (may be missing or empty), "output"}. Instruction and input are joined with an empty line."""
    question = [get_text(record, "instruction", where)]
    if record.get("input"):
        question.append(get_text(record, "input", where))
    return pair("\n\n".join(question), get_text(record, "output", where), left_out)


def _prompt_completion(
    record: dict[str, Any], where: str, options: NoOptions, left_out: Counter[str]
) -> list[Conversation]:
    """Read {"prompt", "completion"}."""
    return pair(get_text(record, "prompt", where), get_text(record, "completion", where), left_out)


def _text(record: dict[str, Any], where: str, options: NoOptions, left_out: Counter[str]) -> list[Conversation]:
    """Read {"text"}, or a whole .txt file: one document without a chat format."""
    text = get_text(record, "text", where)
    return keep([{"role": "text", "content": text}] if text else [], left_out)


def _instruction(name: str) -> Reader:
    """Return the reader of a published dataset of questions and answers."""
    columns = named.INSTRUCTIONS[name]
    keys = (columns.question, columns.answer) if name in ("megacode2", "oa_leet10k") else ()
    return Reader(
        *(name, keys, named.instruction(name), PublishedOptions),
        repositories=(columns.repository,),
        data_files=columns.data_files,
        val_rounding="up",
    )


def _table(readers: Iterable[Reader]) -> dict[str, Reader]:
    return {reader.name: reader for reader in readers}


# In the order of recognition, for files whose format is not given.
READERS = _table(
    [
        Reader(
            *("oasst_export", ("message_tree_id", "prompt"), conversations, OasstOptions),
            repositories=("OpenAssistant/oasst1",),
            splits="train,validation",
        ),
        Reader("messages", ("messages",), _messages),
        Reader("sharegpt", ("conversations",), _sharegpt),
        Reader(
            *("orca-chat", ("instruction", "conversation"), named.orca_chat),
            repositories=("shahules786/orca-chat",),
            data_files="orca-chat-gpt4.json",
            val_rounding="up",
        ),
        Reader(
            *("dolly15k_multilingual", ("instruction", "context", "response"), named.dolly15k, named.DollyOptions),
            repositories=("argilla/databricks-dolly-15k-curated-multilingual",),
            val_rounding="up",
        ),
        Reader("alpaca", ("instruction", "output"), _alpaca),
        Reader("prompt_completion", ("prompt", "completion"), _prompt_completion),
        *map(_instruction, named.INSTRUCTIONS),
        Reader(
            *("dolly15k", (), named.dolly15k_english, named.DollyOptions),
            repositories=("OllieStanley/oa_dolly_15k",),
            val_rounding="up",
        ),
        Reader("dolphin", (), named.dolphin, repositories=("ehartford/dolphin",)),  # alpaca's keys with another meaning
        Reader(
            *("dolphin-mix", (), named.orca_chat, MixOptions),  # of conversations that dolphin_mix.py makes
            repositories=("ehartford/dolphin",),
            data_files="flan5m-alpaca-uncensored.jsonl",
            val_rounding="up",
        ),
        Reader(
            *("alpaca_gpt4", (), named.alpaca_gpt4),
            repositories=("teknium/GPT4-LLM-Cleaned",),
            val_rounding="up",
        ),
        Reader("text", ("text",), _text, marked=1.0),
    ]
)

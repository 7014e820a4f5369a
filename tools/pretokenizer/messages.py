"""The messages of a chat, in OpenAI's words (role, content) or ShareGPT's (from, value), as turns.

A turn keeps what is known of a message: its weight, its reasoning, its tool calls, its name. A context becomes turns of its own before
the message.
"""

import json
from collections.abc import Mapping
from typing import Any

from megatron_ft.data.roles import ROLES
from megatron_ft.errors import DataError, kind_of
from tools.pretokenizer import toolcalls
from tools.pretokenizer.fields import Conversation, get_list, get_text, given, optional_text, weight_of

OTHER_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
"""What files call a speaker besides the names of ROLES."""
CALLS = ("function_call", "tool_call")  # speakers whose text is a call
REASONING = ("reasoning_content", "reasoning", "thinking")
SYSTEM = ("system", "system_prompt", "system_message")
BESIDE = frozenset((*SYSTEM, "tools", "functions", "documents"))
"""What a record may say besides its messages."""
KNOWN = frozenset(
    (
        "role",
        "from",
        "content",
        "value",
        "context",
        "weight",
        "loss",
        "train",
        "tool_call_id",
        "name",
        "tool_calls",
        "function_call",
    )
).union(REASONING)
OTHER = "other"  # key of a turn: what else its message says, for templates that take it
CONTEXT_TEXT = ("text", "content", "document", "passage")


def chat(record: dict[str, Any], key: str, where: str, names: Mapping[str, str] | None = None) -> Conversation:
    """Return the turns of the list of messages in record[key], with the record's system message and tools.

    names: what the file calls "role", "content", "system" and "tools", where it calls them something else.
    """
    turns = [turn for message in get_list(record, key, where) for turn in message_turns(message, where, names)]
    if not names and BESIDE.isdisjoint(record):
        return turns
    turns = toolcalls.with_tools(with_system(turns, record, where, names), record, where, names)
    return turns if names else with_documents(turns, record, where)


def message_turns(message: Any, where: str, names: Mapping[str, str] | None = None) -> Conversation:
    """Return a message as a turn, after the turns of its context."""
    if isinstance(message, dict) and len(message) == 2:  # the common case, which must be fast
        role, content = message.get("role"), message.get("content")
        if isinstance(role, str) and role in ROLES and isinstance(content, str):
            return [message]
    if not isinstance(message, dict):
        raise DataError(f"{where}: a message is {kind_of(message)}, not an object with role and content")
    speaker, text = _keys(message, names or {}, where)
    name = get_text(message, speaker, where)
    role = OTHER_NAMES.get(name, name)
    if role not in ROLES:
        raise DataError(f"{where}: unknown role {name!r}; use one of {', '.join((*ROLES, *OTHER_NAMES))}")
    more = _more(message, role, where)
    others = {
        key: value
        for key, value in message.items()
        if key not in KNOWN and key not in (speaker, text) and value is not None
    }
    more = {**more, OTHER: others} if others else more
    turn = {"role": role, "content": _content(message, text, where, more), **more}
    if name in CALLS:
        turn = toolcalls.from_json_text(turn, where)
    return [*context_turns(message, where), turn]


def with_system(
    turns: Conversation, record: dict[str, Any], where: str, names: Mapping[str, str] | None = None
) -> Conversation:
    """Return the turns after the record's own system message, if it has one that is not among them."""
    keys = [names["system"]] if names and "system" in names else [key for key in SYSTEM if given(record, key)]
    texts = dict.fromkeys(text for key in keys if (text := optional_text(record, key, where)))
    if not texts or not turns:
        return turns
    if turns[0]["role"] == "system":
        texts[turns[0]["content"]] = None
    if len(texts) > 1:
        raise DataError(f"{where}: has different system messages (in {', '.join(keys)} and the chat); keep one of them")
    if turns[0]["role"] == "system":
        return turns
    return [{"role": "system", "content": text} for text in texts] + turns


def with_documents(turns: Conversation, record: dict[str, Any], where: str) -> Conversation:
    """Return the turns with the record's "documents" in the first one, for templates that write them."""
    if not given(record, "documents") or not turns:
        return turns
    found = get_list(record, "documents", where)
    if not all(isinstance(document, dict) for document in found):
        raise DataError(f"{where}: 'documents' is not a list of objects; write each as {{'title': ..., 'text': ...}}")
    toolcalls.check_text(found, where)
    return [{**turns[0], "documents": found}, *turns[1:]]


def context_turns(record: dict[str, Any], where: str, key: str = "context") -> Conversation:
    """Return the turns of a context: text, or an object with a text and what is known of it, or a list of these."""
    if not given(record, key):
        return []
    blocks = record[key] if isinstance(record[key], list) else [record[key]]
    return [{"role": "context", "content": _block(block, where, key)} for block in blocks]


def _block(block: Any, where: str, key: str) -> str:
    """Return a context as text. What is known of it stands before it as in Airoboros: lines of `key: value` between two marks."""
    if isinstance(block, str):
        return block
    name = next((name for name in CONTEXT_TEXT if isinstance(block, dict) and name in block), None)
    if name is None:
        raise DataError(
            f"{where}: '{key}' holds {kind_of(block)} without a text; give text, or an object with one of {', '.join(CONTEXT_TEXT)}"
        )
    lines = [f"{key}: {_plain(value)}" for key, value in block.items() if key != name and value is not None]
    text = get_text(block, name, where)
    return "\n".join(["BEGINCONTEXT", *lines, "ENDCONTEXT", text]) if lines else text


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _keys(message: dict[str, Any], names: Mapping[str, str], where: str) -> tuple[str, str]:
    """Return what this message calls its speaker and its text."""
    speaker = names.get("role") or _one_of(message, "role", "from", where)
    return speaker, names.get("content") or _one_of(message, "content", "value", where)


def _one_of(message: dict[str, Any], key: str, other: str, where: str) -> str:
    """Return which of two keys a message uses; a null says nothing. Raise DataError if they say different things."""
    if message.get(other) is None:
        return key
    if message.get(key) is None:
        return other
    both = [
        OTHER_NAMES.get(value, value) if isinstance(value, str) else value for value in (message[key], message[other])
    ]
    if both[0] != both[1]:
        raise DataError(f"{where}: a message says different things in '{key}' and '{other}'; keep one of them")
    return key


def _more(message: dict[str, Any], role: str, where: str) -> dict[str, Any]:
    """Return what a message says besides its text."""
    more = {**weight_of(message, where), **_reasoning(message, role, where), **toolcalls.tool_keys(message, where)}
    if role != "assistant" and "tool_calls" in more:
        raise DataError(f"{where}: a message by the {role} calls a tool; only the assistant can")
    if role != "assistant" and message.get("train") and more.get("weight", 1):
        more["marked"] = True
    return more


def _reasoning(message: dict[str, Any], role: str, where: str) -> dict[str, str]:
    found = {text for key in REASONING if (text := optional_text(message, key, where))}
    if len(found) > 1 or (found and role != "assistant"):
        problem = "different reasonings" if role == "assistant" else f"reasoning by the {role}"
        raise DataError(f"{where}: a message has {problem} (in {', '.join(REASONING)}); keep one, of the assistant")
    for text in found:
        _check_text(text, where)
    return {"reasoning_content": found.pop()} if found else {}


def _content(message: dict[str, Any], key: str, where: str, more: dict[str, Any]) -> str:
    """Return a message's text: from a string or OpenAI's list of parts; it may be missing beside tool calls or reasoning."""
    content = message.get(key)
    if isinstance(content, list):
        return "".join(_part(part, where) for part in content)
    if content is None and ("tool_calls" in more or "reasoning_content" in more):
        return ""
    return get_text(message, key, where)


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text":
        return get_text(part, "text", where)
    kind = f"of type {part['type']}" if isinstance(part, dict) and part.get("type") else f"that is {kind_of(part)}"
    raise DataError(f"{where}: a message has a part {kind}; only text can be tokenized")


def _check_text(text: str, where: str) -> None:
    """Raise DataError for half a character, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: the text contains a lone surrogate (half a character); repair or remove it"
        ) from None

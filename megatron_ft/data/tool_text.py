"""Tools and reasoning in our chat formats: definitions are part of the system message, reasoning precedes the assistant's text, calls
follow it.

    {"role": "assistant", "content": "Let me see.", "tool_calls": [{"type": "function", "function": {"name", "arguments"}}]}

The "reasoning_content" of a message is between <think> and </think>, as in most models that reason. The definitions are the "tools" of the
first message, in OpenAI's form. Everything becomes ordinary text of the messages, so it needs no special token. The template for
transformers writes the same text (chat_jinja.py). The result of a tool is an ordinary message. Chat formats are in other modules.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_ft.data.roles import ASSISTANT, MARKED, ROLES, SYSTEM, TOOL_CALL
from megatron_ft.data.spoken import joined, reasoning_role, segments

DEFINED = (
    "You can call these functions:\n<tools>",
    "\n</tools>\nTo call one, say its name and arguments:\n"
    + ('<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>'),
)
CALLED = '<tool_call>\n{"name": ', ', "arguments": ', "}\n</tool_call>"
THOUGHT = ("<think>\n", "\n</think>\n\n")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # in messages; the first is the standard name
APART = "\n\n"  # between a system message and the definitions
SAID = "said"  # key of a message: its text in stretches of known roles
_BESIDE = ("tools", "tool_calls", *REASONING_KEYS)


def has_tools(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a chat says anything besides its texts."""
    return any(not message.keys().isdisjoint(_BESIDE) for message in messages)


def as_text(messages: Sequence[Mapping[str, Any]], default_system: str | None, strip: bool) -> list[Mapping[str, Any]]:
    """Return the messages with "tools", "tool_calls" and "reasoning_content" as text. A system message is inserted if one is needed and
    there is none. strip: remove white space around the text of messages.
    """
    result: list[Mapping[str, Any]] = []
    tools = next((message["tools"] for message in messages if message.get("tools")), None)
    for message in messages:
        content = message.get("content")
        text = {"content": content}
        if isinstance(content, str):
            pieces = said(message, content, strip)
            text = {"content": "".join(piece for _, piece in pieces)}
            text |= {SAID: pieces} if len(pieces) > 1 or any(role != ASSISTANT for role, _ in pieces) else {}
        result.append({k: v for k, v in message.items() if k not in _BESIDE} | text)
    if tools:
        if not result or ROLES.get(str(result[0].get("role"))) != SYSTEM:
            marked = result[0].get("mark_bits", 0) & MARKED if result else 0
            result.insert(0, {"role": "system", "content": default_system or "", "mark_bits": marked})
        system = result[0].get("content")
        if isinstance(system, str):
            result[0] = {**result[0], "content": APART.join([*([system] if system else []), definitions(tools)])}
    return result


def said(message: Mapping[str, Any], content: str, strip: bool) -> list[tuple[int, str]]:
    """Return a message's text with the roles of an assistant's: its reasoning, its content, its calls."""
    reasoning = next((message[key] for key in REASONING_KEYS if message.get(key) is not None), None)
    calls = "\n".join(map(_call, message.get("tool_calls") or []))
    speaks = ROLES.get(str(message.get("role"))) == ASSISTANT
    pieces = (
        segments(content.strip() if strip else content)
        if speaks
        else [(ASSISTANT, content.strip() if strip else content)]
    )
    if reasoning and speaks:
        pieces.insert(0, (reasoning_role(reasoning), f"{THOUGHT[0]}{reasoning}{THOUGHT[1]}"))
    own = "".join(piece for _, piece in pieces)
    if strip:
        kept = len(own.rstrip())
        pieces = [(role, piece) for role, piece in _up_to(pieces, kept) if piece]
        own = own[:kept]
    if calls:
        pieces += [(ASSISTANT, "\n")] if own else []
        pieces.append((TOOL_CALL, calls))
    return joined(pieces)


def _up_to(pieces: list[tuple[int, str]], length: int) -> Iterator[tuple[int, str]]:
    for role, piece in pieces:
        yield role, piece[: max(0, length)]
        length -= len(piece)


def definitions(tools: Sequence[Any]) -> str:
    return DEFINED[0] + "".join(f"\n{_json(tool)}" for tool in tools) + DEFINED[1]


def _call(call: Mapping[str, Any]) -> str:
    function = call.get("function") or call
    arguments = function.get("arguments") or {}
    # A string: invalid JSON that the model wrote.
    written = arguments if isinstance(arguments, str) else _json(arguments)
    return f"{CALLED[0]}{_json(function['name'])}{CALLED[1]}{written}{CALLED[2]}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)  # as transformers' tojson

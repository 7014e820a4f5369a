"""Tools in chat files: definitions and calls in the format of OpenAI's API, checked and normalised.

Definitions go to the chat's first message ("tools"), calls stay with their message ("tool_calls"). The chat format converts both to
text. Arguments that are a string of JSON, as in that API, are parsed.
"""

import contextlib
import json
from typing import Any

from megatron_ft.errors import DataError
from tools.pretokenizer.fields import Conversation

REMEDY = "see docs/pretokenizer.md for the format of tools"


def with_tools(turns: Conversation, record: dict[str, Any], where: str) -> Conversation:
    """Return the turns with the record's "tools" (or "functions"), if there are any, in the first turn."""
    found = record.get("tools") or record.get("functions")
    if isinstance(found, str):
        found = (_loads(found) or "invalid") if found.strip() not in ("", "[]") else None
    if not found or not turns:
        return turns
    if not isinstance(found, list) or not all(_has_name(tool) for tool in found):
        raise DataError(f"{where}: 'tools' is not a list of functions with names; {REMEDY}")
    _check_text(found, where)
    whole = [
        tool if isinstance(tool.get("function"), dict) else {"type": "function", "function": tool} for tool in found
    ]
    return [{**turns[0], "tools": whole}, *turns[1:]]


def tool_keys(message: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a message's keys about tools: "tool_calls", "tool_call_id" and "name", if it has them."""
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    if not isinstance(calls, list) or not all(_has_name(call) for call in calls):
        raise DataError(f"{where}: a tool call has no function name; {REMEDY}")
    result = {"tool_calls": [_call(call) for call in calls]} if calls else {}
    result |= {key: message[key] for key in ("tool_call_id", "name") if isinstance(message.get(key), str)}
    if calls:
        _check_text(result, where)
    return result


def from_json_text(turn: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a turn whose text is a call, {"name", "arguments"}, or a list of calls, with "tool_calls"; others unchanged."""
    found = _loads(turn["content"])
    found = found if isinstance(found, list) else [found]
    if not found or not all(_has_name(call) for call in found):
        return turn
    _check_text(found, where)
    return {**turn, "content": "", "tool_calls": [_call(call) for call in found]}


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function") or call
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        read = _loads(arguments)
        arguments = read if isinstance(read, dict) else arguments  # invalid arguments of a model are kept as text
    known = {key: call[key] for key in ("id", "type") if isinstance(call.get(key), str)}
    return {"type": "function", **known, "function": {"name": function["name"], "arguments": arguments}}


def _has_name(value: Any) -> bool:
    function = (value.get("function") or value) if isinstance(value, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _loads(text: str) -> Any:
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    return None


def _check_text(value: Any, where: str) -> None:
    """Raise DataError for what cannot be written as JSON and UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
        raise DataError(
            f"{where}: tools contain a lone surrogate, NaN or infinity, or are nested too deeply; {REMEDY}"
        ) from error

"""Tools in chat files: definitions and calls in the format of OpenAI's API, checked and normalised.

Definitions go to the chat's first message ("tools"), calls stay with their message ("tool_calls"). The chat format converts both to
text. Arguments that are a string of JSON, as in that API, are parsed.
"""

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from megatron_ft.errors import DataError, kind_of
from tools.pretokenizer.fields import Conversation

REMEDY = "see docs/pretokenizer.md for the format of tools"
CALL_KEYS = {"name", "arguments", "id", "type", "function"}


def with_tools(
    turns: Conversation, record: dict[str, Any], where: str, names: Mapping[str, str] | None = None
) -> Conversation:
    """Return the turns with the record's "tools" (or "functions"), if there are any, in the first turn."""
    own, functions = record.get((names or {}).get("tools", "tools")), record.get("functions")
    if own and functions:
        raise DataError(f"{where}: has both 'tools' and 'functions'; keep one of them")
    found = own or functions
    if isinstance(found, str):
        found = (_loads(found) or "invalid") if found.strip() not in ("", "[]") else None
    if not found or not turns:
        return turns
    if not isinstance(found, list) or not all(_has_name(tool) for tool in found):
        raise DataError(f"{where}: 'tools' is not a list of functions with names; {REMEDY}")
    check_text(found, where)
    whole = [
        tool if isinstance(tool.get("function"), dict) else {"type": "function", "function": tool} for tool in found
    ]
    return [{**turns[0], "tools": whole}, *turns[1:]]


def tool_keys(message: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a message's keys about tools: "tool_calls", "tool_call_id" and "name", if it has them."""
    calls, one = message.get("tool_calls") or [], message.get("function_call")
    if calls and one:
        raise DataError(f"{where}: a message has both 'tool_calls' and 'function_call'; keep one of them")
    calls = [one] if one else calls
    if not isinstance(calls, list) or not all(_has_name(call) for call in calls):
        raise DataError(f"{where}: a tool call has no function name; {REMEDY}")
    result: dict[str, Any] = {"tool_calls": [_call(call, where) for call in calls]} if calls else {}
    for key in ("tool_call_id", "name"):
        if (value := message.get(key)) is not None:
            if not isinstance(value, str):
                raise DataError(f"{where}: a message's '{key}' is {kind_of(value)}, not text; write it as a string")
            result[key] = value
    if result:
        check_text(result, where)
    return result


def from_json_text(turn: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a turn whose text is a call, {"name", "arguments"}, or a list of calls, with "tool_calls". A turn with another text is
    returned unchanged, and so is one whose call says more than these."""
    found = _loads(turn["content"])
    found = found if isinstance(found, list) else [found]
    if not found or not all(_has_name(call) and call.keys() <= CALL_KEYS for call in found):
        return turn
    check_text(found, where)
    return {**turn, "content": "", "tool_calls": [_call(call, where) for call in found]}


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function") or call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        read = _loads(arguments)
        arguments = read if isinstance(read, dict) else arguments  # invalid arguments of a model are kept as text
    if arguments is not None and not isinstance(arguments, dict | str):
        raise DataError(f"{where}: the arguments of a tool call are {kind_of(arguments)}, not an object; {REMEDY}")
    known = {key: call[key] for key in ("id", "type") if isinstance(call.get(key), str)}
    return {"type": "function", **known, "function": {"name": function["name"], "arguments": arguments or {}}}


def _has_name(value: Any) -> bool:
    function = (value.get("function") or value) if isinstance(value, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _loads(text: str) -> Any:
    """Return the JSON in a text; None for other texts, and for an object that says a key twice."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text, object_pairs_hook=_once)
    return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(result := dict(pairs)) < len(pairs):
        raise ValueError("a key is said twice")
    return result


def check_text(value: Any, where: str) -> None:
    """Raise DataError for what cannot be written as JSON and UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
        raise DataError(
            f"{where}: tools or documents contain what JSON cannot say (a lone surrogate, NaN, infinity, a date), or are nested too "
            f"deeply; {REMEDY}"
        ) from error

"""Questions that the page sends: checked before a model sees them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_ft.chat.conversation import Message
from megatron_ft.chat.values import changed
from megatron_ft.errors import DataError

if TYPE_CHECKING:
    from megatron_ft.chat.settings import Settings

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Question:
    """What one model is asked."""

    model: int
    messages: list[Message]
    settings: Settings


def parse_question(body: bytes, settings: Settings, models: int) -> Question:
    """Return the question {"model": number, "messages": [...], "values": {...}}. settings: for values that it does not have.

    Raise UserError with what is wrong.
    """
    try:
        entry = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DataError(f"a question must be JSON ({str(error)[:80]})") from error
    if not isinstance(entry, dict):
        raise DataError("a question must be an object")
    model, values = entry.get("model", 0), entry.get("values", {})
    if type(model) is not int or not 0 <= model < models:
        raise DataError(f"model {str(model)[:20]}: there are {models}, counted from 0")
    if not isinstance(values, dict):
        raise DataError("values must be an object of names and numbers")
    for name, value in values.items():
        settings = changed(settings, name, value)
    return Question(model, _messages(entry.get("messages")), settings)


def _messages(found: Any) -> list[Message]:
    if not isinstance(found, list) or not all(_is_message(one) for one in found):
        raise DataError(f'messages must be a list of {{"role": one of {", ".join(ROLES)}, "content": text}}')
    if not found or found[-1]["role"] != "user":
        raise DataError("the last message must be the user's")
    return [{"role": one["role"], "content": _characters(one["content"])} for one in found]


def _characters(text: str) -> str:
    """Return a text without halves of characters, which JSON can hold and no tokenizer reads."""
    return text.encode("utf-8", "replace").decode()


def _is_message(one: Any) -> bool:
    return isinstance(one, dict) and one.get("role") in ROLES and isinstance(one.get("content"), str)

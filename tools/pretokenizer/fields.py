"""Access to the fields of a record with checked types, and conversations made from them."""

import contextlib
import json
from collections import Counter
from typing import Any

from megatron_ft.errors import DataError, kind_of

Conversation = list[dict[str, Any]]
"""{"role", "content"}, and what a file says beside: "weight", "marked", "reasoning_content", "name", tools (toolcalls.py)."""
DOCS = "see docs/pretokenizer.md for the formats of chat files"


def is_row(where: str) -> bool:
    """Return whether a place is in a table, where an empty cell is no value."""
    return ", row " in where


def get(record: Any, key: str, where: str) -> Any:
    if not isinstance(record, dict) or key not in record:
        problem = "has no value in this row" if is_row(where) else "is missing"
        raise DataError(f"{where}: the key '{key}' {problem}; {DOCS}")
    return record[key]


def get_list(record: Any, key: str, where: str) -> list[Any]:
    """Return a list, also from its JSON as text, which is how a cell of CSV holds one."""
    value = from_json(get(record, key, where))
    if not isinstance(value, list):
        raise DataError(f"{where}: '{key}' is {kind_of(value)}, not a list; write it as a list, or as the JSON of one")
    return value


def from_json(value: Any) -> Any:
    """Return the list or object that a text holds as JSON; other values as they are."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def get_text(record: Any, key: str, where: str) -> str:
    value = get(record, key, where)
    if not isinstance(value, str):
        raise DataError(f"{where}: '{key}' is {kind_of(value)}, not text; write it as a string")
    return value


def optional_text(record: dict[str, Any], key: str, where: str) -> str:
    """Return a text that may be missing, null or empty: "" then."""
    return "" if record.get(key) is None else get_text(record, key, where)


def given(record: dict[str, Any], key: str) -> bool:
    """Return whether a record says something under a key: a missing, null or empty value says nothing."""
    value = record.get(key)
    return value is not None and value != "" and value != [] and value != {}


def weight_of(message: dict[str, Any], where: str) -> dict[str, Any]:
    """Return {"weight": w} if a message says how much it counts: by a number, or by `loss` or `train`, which are true or false.

    Where it is said more than once, the values are multiplied. `train: true` at a turn that is not the assistant's marks it.
    """
    weights = [weight for key in ("loss", "train") if (weight := _switch(message, key, where)) is not None]
    if (own := message.get("weight")) is not None:
        if isinstance(own, bool) or not isinstance(own, int | float) or not 0 <= own <= 1e30:
            raise DataError(f"{where}: a message has the weight {own!r}; give a number that is not negative")
        weights.append(round(float(own), 4))
    weight = 1.0
    for one in weights:
        weight *= one
    return {"weight": weight} if own is not None or weight != 1 else {}


def _switch(message: dict[str, Any], key: str, where: str) -> float | None:
    value = message.get(key)
    if value is None:
        return None
    if not isinstance(value, bool) and value not in (0, 1):
        raise DataError(
            f"{where}: a message's '{key}' is {kind_of(value)}; give true or false, or a number as its weight"
        )
    return float(value)


def pair(question: str, answer: str, left_out: Counter[str]) -> list[Conversation]:
    return keep([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], left_out)


def keep(turns: Conversation, left_out: Counter[str]) -> list[Conversation]:
    if not turns:
        left_out["chat without messages"] += 1
    return [turns] if turns else []

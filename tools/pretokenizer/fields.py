"""Taking a record apart: fields with their kind checked, and conversations made of them."""

from collections import Counter
from typing import Any

from megatron_ft.errors import DataError

Conversation = list[dict[str, Any]]  # {"role", "content"}, and "weight" where the file gives one


def get(record: Any, key: str, where: str) -> Any:
    if not isinstance(record, dict) or key not in record:
        raise DataError(f"{where}: no '{key}' in it; see docs/pretokenizer.md for the shapes of chat files")
    return record[key]


def get_list(record: Any, key: str, where: str) -> list[Any]:
    value = get(record, key, where)
    if not isinstance(value, list):
        raise DataError(f"{where}: '{key}' is {type(value).__name__}, not a list; see docs/pretokenizer.md")
    return value


def get_text(record: Any, key: str, where: str) -> str:
    value = get(record, key, where)
    if not isinstance(value, str):
        raise DataError(f"{where}: '{key}' is {type(value).__name__}, not text; write it as a string")
    return value


def weight_of(message: dict[str, Any], where: str) -> dict[str, float]:
    """{"weight": w} where a message gives one, else {}."""
    weight = message.get("weight")
    if weight is None:
        return {}
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1e30:
        raise DataError(f"{where}: weight {weight!r} of a message; give a number from 0 on")
    return {"weight": round(float(weight), 4)}


def pair(question: str, answer: str, left_out: Counter[str]) -> list[Conversation]:
    return keep([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], left_out)


def keep(turns: Conversation, left_out: Counter[str]) -> list[Conversation]:
    if not turns:
        left_out["chat without messages"] += 1
    return [turns] if turns else []

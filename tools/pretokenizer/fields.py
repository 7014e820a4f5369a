"""Access to the fields of a record with checked types, and conversations made from them."""

from collections import Counter
from typing import Any

from megatron_ft.errors import DataError

Conversation = list[dict[str, Any]]  # {"role", "content"}, and "weight" if the file has one


def get(record: Any, key: str, where: str) -> Any:
    if not isinstance(record, dict) or key not in record:
        raise DataError(f"{where}: the key '{key}' is missing; see docs/pretokenizer.md for the formats of chat files")
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
    """Return {"weight": w} if a message has one, else {}."""
    weight = message.get("weight")
    if weight is None:
        return {}
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1e30:
        raise DataError(f"{where}: a message has the weight {weight!r}; give a number that is not negative")
    return {"weight": round(float(weight), 4)}


def pair(question: str, answer: str, left_out: Counter[str]) -> list[Conversation]:
    return keep([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], left_out)


def keep(turns: Conversation, left_out: Counter[str]) -> list[Conversation]:
    if not turns:
        left_out["chat without messages"] += 1
    return [turns] if turns else []

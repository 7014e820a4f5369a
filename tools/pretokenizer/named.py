"""Readers of the published datasets in Open-Assistant's configurations: one function each, from a record to conversations.

readers.READERS has their published names, by which local copies are found.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from megatron_ft.errors import DataError
from tools.pretokenizer.fields import Conversation, get_list, get_text, keep, pair

# Citation marks of the original text: [12], [a], [citation needed].
CITATIONS = re.compile(r"\[(?:\d{1,3}|[a-z]|citation needed)\]", re.IGNORECASE)


@dataclass(frozen=True)
class DollyOptions:
    """Languages of the multilingual copy to take."""

    lang: str | list[str] = "en,de,es,fr"
    """Splits (files named en-..., de-...) of a folder; records with another language are left out."""

    @property
    def languages(self) -> list[str]:
        names = self.lang.split(",") if isinstance(self.lang, str) else self.lang
        return [name.strip() for name in names]


def megacode2(record: dict[str, Any], where: str, options: Any, left_out: Counter[str]) -> list[Conversation]:
    """Read {"USER", "ASSISTANT"}."""
    return pair(get_text(record, "USER", where), get_text(record, "ASSISTANT", where), left_out)


def oa_leet10k(record: dict[str, Any], where: str, options: Any, left_out: Counter[str]) -> list[Conversation]:
    """Read {"INSTRUCTION", "RESPONSE"}."""
    return pair(get_text(record, "INSTRUCTION", where), get_text(record, "RESPONSE", where), left_out)


def orca_chat(record: dict[str, Any], where: str, options: Any, left_out: Counter[str]) -> list[Conversation]:
    """Read {"instruction": the system message, "conversation": [{"input", "output"}]}."""
    turns = _system(record, where)
    for number, turn in enumerate(get_list(record, "conversation", where), 1):
        if not isinstance(turn, dict):
            raise DataError(f"{where}: turn {number} is {type(turn).__name__}, not an object with input and output")
        turns.append({"role": "user", "content": get_text(turn, "input", where)})
        turns.append({"role": "assistant", "content": get_text(turn, "output", where)})
    return keep(turns if len(turns) > 1 else [], left_out)


def dolly15k(record: dict[str, Any], where: str, options: DollyOptions, left_out: Counter[str]) -> list[Conversation]:
    """Read {"instruction", "context" (may be empty), "response"}; citation marks are removed from the context."""
    language = record.get("lang") or record.get("language")
    if language and language not in options.languages:
        left_out["other language"] += 1
        return []
    context = CITATIONS.sub("", get_text(record, "context", where)).strip() if record.get("context") else ""
    turns = [{"role": "context", "content": context}] if context else []
    turns.append({"role": "user", "content": get_text(record, "instruction", where)})
    turns.append({"role": "assistant", "content": get_text(record, "response", where)})
    return keep(turns, left_out)


def dolphin(record: dict[str, Any], where: str, options: Any, left_out: Counter[str]) -> list[Conversation]:
    """Read {"instruction": the system message, "input", "output"}."""
    turns = _system(record, where)
    turns.append({"role": "user", "content": get_text(record, "input", where)})
    turns.append({"role": "assistant", "content": get_text(record, "output", where)})
    return keep(turns, left_out)


def _system(record: dict[str, Any], where: str) -> Conversation:
    text = get_text(record, "instruction", where) if record.get("instruction") else ""
    return [{"role": "system", "content": text}] if text.strip() else []

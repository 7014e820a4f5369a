"""Selection of conversations: by the order of roles, language, refusals and, after tokenization, by length.

Pure functions of one conversation. Each rejection has a reason, which is counted. Duplicates, which need all conversations, are in
duplicates.py.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megatron_ft.data.roles import are_spoken
from megatron_ft.errors import ConfigError
from tools.pretokenizer.fields import Conversation

# Phrases of refusals, and phrases that name another assistant. Compared in lower case.
REFUSALS = (
    "as an ai language model",
    "as a language model",
    "as an ai assistant",
    "as an ai model",
    "i'm sorry, but i can't",
    "i'm sorry, but i cannot",
    "i am sorry, but i cannot",
    "i cannot fulfill",
    "i can't fulfill",
    "i cannot assist with",
    "i can't assist with",
    "i cannot provide",
    "i'm not able to provide",
    "my training data",
    "trained by openai",
    "developed by openai",
    "my knowledge cutoff",
)


@dataclass(frozen=True)
class Selection:
    """Configuration keys of a section, for all its datasets, or of one dataset."""

    min_tokens: int | None = None
    """Skip samples with fewer tokens."""
    max_tokens: int | None = None
    """Skip samples with more tokens."""
    min_assistant_tokens: int | None = None
    """Skip samples whose assistant turns have fewer tokens in total, headers included."""
    role_order: Literal["keep", "repair", "reject"] = "keep"
    """Chats whose roles are not in the order system, user, assistant, user, ... are kept, repaired or rejected."""
    refusal_phrases: bool | list[str] | str = False
    """Leave out chats in which the assistant uses one of these phrases; true: the built-in list."""
    languages: list[str] | str | None = None
    """Take only records with one of these values in lang or language."""

    def check(self, where: str) -> None:
        """Raise ConfigError for values that contradict each other."""
        for name in ("min_tokens", "max_tokens", "min_assistant_tokens"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ConfigError(f"{where}: {name} is {value}; give a number that is not negative")
        if self.min_tokens is not None and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ConfigError(f"{where}: min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")

    @property
    def phrases(self) -> tuple[str, ...]:
        if isinstance(self.refusal_phrases, bool):
            return REFUSALS if self.refusal_phrases else ()
        given = self.refusal_phrases.split(",") if isinstance(self.refusal_phrases, str) else self.refusal_phrases
        return tuple(phrase.strip().lower() for phrase in given if phrase.strip())

    @property
    def wanted_languages(self) -> frozenset[str]:
        names = self.languages.split(",") if isinstance(self.languages, str) else self.languages or []
        return frozenset(name.strip() for name in names)


def language_fault(record: dict[str, Any], languages: frozenset[str]) -> str | None:
    """Return the reason why a record is left out for its language, or None."""
    if not languages:
        return None
    language = record.get("lang") or record.get("language")
    known = isinstance(language, str) and language
    return None if known in languages else "other language" if known else "language unknown"


def in_order(chat: Conversation, role_order: str) -> tuple[Conversation, str | None]:
    """Return the chat, repaired if requested, and the reason why it is left out, or None."""
    if role_order == "keep" or chat[0]["role"] == "text" or _is_ordered(chat):
        return chat, None
    if role_order == "reject":
        return chat, "roles out of order"
    repaired = _repair(chat)
    return (repaired, None) if repaired and _is_ordered(repaired) else (chat, "roles out of order, beyond repair")


def _is_ordered(chat: Conversation) -> bool:
    """Return True if a system turn is only at the start, user and assistant alternate and the assistant is last. Turns of tools and
    contexts may be between them."""
    roles = [_SIDES.get(message["role"], "") for message in chat]
    sides = [role for role in (roles[1:] if roles[0] == "system" else roles) if role]
    if "system" in sides or len(sides) < 2 or roles[-1] != "assistant":
        return False
    expected, previous = "user", ""
    for side, message in zip(sides, [m for m in chat if _SIDES.get(m["role"]) in ("user", "assistant")], strict=True):
        if side != expected and not (side == "assistant" and _answers_a_tool(chat, message)):
            return False
        previous, expected = side, "assistant" if side == "user" else "user"
    return previous == "assistant"


def _answers_a_tool(chat: Conversation, message: dict[str, Any]) -> bool:
    """Return True if the turn before is a tool's, after which the assistant continues without a user turn."""
    place = next(i for i, other in enumerate(chat) if other is message)
    return place > 0 and chat[place - 1]["role"] == "tool"


_SIDES = {"system": "system", "user": "user", "prompter": "user", "assistant": "assistant"}


def _repair(chat: Conversation) -> Conversation:
    """Join successive turns of one role; remove answers before the first question and questions after the last answer."""
    result: Conversation = []
    for message in chat:
        side = _SIDES.get(message["role"])
        if result and side in ("user", "assistant") and _can_join(result[-1], message):
            texts = [text for one in (result[-1], message) if (text := one["content"])]
            calls = [call for one in (result[-1], message) for call in one.get("tool_calls", [])]
            result[-1] = {**result[-1], "content": "\n\n".join(texts), **({"tool_calls": calls} if calls else {})}
        elif side != "assistant" or any(_SIDES.get(earlier["role"]) == "user" for earlier in result):
            result.append(message)
    while result and _SIDES.get(result[-1]["role"]) != "assistant":
        result.pop()
    return result


def _can_join(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Return True for turns of one side that count the same, the second without reasoning of its own, which belongs before its text."""
    same = _SIDES.get(first["role"]) == _SIDES.get(second["role"])
    alike = first.get("weight", 1) == second.get("weight", 1) and first.get("marked") == second.get("marked")
    return same and alike and "reasoning_content" not in second


def refuses(chat: Conversation, phrases: tuple[str, ...]) -> bool:
    """Return True if an assistant turn contains one of the phrases, which are in lower case."""
    for message in chat:
        if message["role"] == "assistant":
            text = message["content"].lower().replace("’", "'")
            if any(phrase in text for phrase in phrases):
                return True
    return False


def token_faults(role_bytes: np.ndarray, lengths: np.ndarray, selection: Selection) -> tuple[np.ndarray, list[str]]:
    """Return why samples are skipped for their lengths: for each 0 if it is not, else an index into the returned reasons."""
    reasons, faults = ["", "no tokens"], (lengths == 0).astype(np.int64)
    limits: list[tuple[str, np.ndarray | None]] = []
    if selection.min_assistant_tokens is not None:
        assistant = np.concatenate([[0], np.cumsum(are_spoken(role_bytes))])
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        few = np.diff(assistant[bounds]) < selection.min_assistant_tokens
        limits.append((f"fewer than {selection.min_assistant_tokens} assistant tokens", few))
    if selection.min_tokens is not None:
        limits.append((f"fewer than {selection.min_tokens} tokens", lengths < selection.min_tokens))
    if selection.max_tokens is not None:
        limits.append((f"more than {selection.max_tokens} tokens", lengths > selection.max_tokens))
    for reason, hit in limits:
        reasons.append(reason)
        faults[(faults == 0) & hit] = len(reasons) - 1
    return faults, reasons

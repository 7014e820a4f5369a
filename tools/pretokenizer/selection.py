"""Which conversations are good enough: by the roles' order, the language, refusals, and, once tokenized, by length.

Pure functions of one conversation; each no has a reason that is counted. Duplicates, which need all of them, are
duplicates.py's.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megatron_ft.data.roles import ASSISTANT, ROLE_BITS
from megatron_ft.errors import ConfigError
from tools.pretokenizer.fields import Conversation

# What assistants say when they decline, and what gives away whose answers were copied. Compared in lower case.
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
    """Keys of a section, for all its datasets, or of one dataset."""

    min_tokens: int | None = None
    """Skip samples with fewer tokens."""
    max_tokens: int | None = None
    """Skip samples with more tokens."""
    min_assistant_tokens: int | None = None
    """Skip samples whose assistant turns have fewer tokens together, headers included."""
    role_order: Literal["keep", "repair", "reject"] = "keep"
    """What to do where roles do not follow system, user, assistant, user, ...: nothing, mend it, or leave the chat out."""
    refusal_phrases: bool | list[str] | str = False
    """Leave out chats in which the assistant uses one of these phrases; true: a list of our own."""
    languages: list[str] | str | None = None
    """Take only records whose lang or language is one of these."""

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
    """Why a record is left out for its language, or None."""
    if not languages:
        return None
    language = record.get("lang") or record.get("language")
    known = isinstance(language, str) and language
    return None if known in languages else "other language" if known else "language unknown"


def in_order(chat: Conversation, role_order: str) -> tuple[Conversation, str | None]:
    """The chat as wanted, and why it is left out, or None."""
    if role_order == "keep" or chat[0]["role"] == "text" or _is_ordered(chat):
        return chat, None
    if role_order == "reject":
        return chat, "roles out of order"
    mended = _mend(chat)
    return (mended, None) if mended and _is_ordered(mended) else (chat, "roles out of order, beyond repair")


def _is_ordered(chat: Conversation) -> bool:
    """A system turn at most at the start, user and assistant in turns, the last word the assistant's. What tools and
    contexts say stands between."""
    roles = [_SIDES.get(message["role"], "") for message in chat]
    spoken = [role for role in (roles[1:] if roles[0] == "system" else roles) if role]
    if "system" in spoken or len(spoken) < 2 or roles[-1] != "assistant":
        return False
    expected, previous = "user", ""
    for side, message in zip(spoken, [m for m in chat if _SIDES.get(m["role"]) in ("user", "assistant")], strict=True):
        if side != expected and not (side == "assistant" and _answers_a_tool(chat, message)):
            return False
        previous, expected = side, "assistant" if side == "user" else "user"
    return previous == "assistant"


def _answers_a_tool(chat: Conversation, message: dict[str, Any]) -> bool:
    """Whether the turn just before is a tool's: then the assistant speaks again without a user in between."""
    place = next(i for i, other in enumerate(chat) if other is message)
    return place > 0 and chat[place - 1]["role"] == "tool"


_SIDES = {"system": "system", "user": "user", "prompter": "user", "assistant": "assistant"}


def _mend(chat: Conversation) -> Conversation:
    """Turns of one speaker in a row made one, answers before any question and questions after the last answer cut off."""
    result: Conversation = []
    for message in chat:
        side = _SIDES.get(message["role"])
        if result and side in ("user", "assistant") and _SIDES.get(result[-1]["role"]) == side:
            texts = [text for one in (result[-1], message) if (text := one["content"])]
            calls = [call for one in (result[-1], message) for call in one.get("tool_calls", [])]
            result[-1] = {**result[-1], "content": "\n\n".join(texts), **({"tool_calls": calls} if calls else {})}
        elif side != "assistant" or any(_SIDES.get(earlier["role"]) == "user" for earlier in result):
            result.append(message)
    while result and _SIDES.get(result[-1]["role"]) != "assistant":
        result.pop()
    return result


def refuses(chat: Conversation, phrases: tuple[str, ...]) -> bool:
    """Whether the assistant uses one of the phrases (given in lower case) anywhere."""
    for message in chat:
        if message["role"] == "assistant":
            said = message["content"].lower().replace("’", "'")
            if any(phrase in said for phrase in phrases):
                return True
    return False


def token_faults(codes: np.ndarray, lengths: np.ndarray, selection: Selection) -> tuple[np.ndarray, list[str]]:
    """Why samples are skipped for their lengths: a number for each, 0 for none, else an index into the reasons."""
    reasons, faults = ["", "no tokens"], (lengths == 0).astype(np.int64)
    limits: list[tuple[str, np.ndarray | None]] = []
    if selection.min_assistant_tokens is not None:
        spoken = np.concatenate([[0], np.cumsum(codes & ROLE_BITS == ASSISTANT)])
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        few = np.diff(spoken[bounds]) < selection.min_assistant_tokens
        limits.append((f"fewer than {selection.min_assistant_tokens} assistant tokens", few))
    if selection.min_tokens is not None:
        limits.append((f"fewer than {selection.min_tokens} tokens", lengths < selection.min_tokens))
    if selection.max_tokens is not None:
        limits.append((f"more than {selection.max_tokens} tokens", lengths > selection.max_tokens))
    for reason, hit in limits:
        reasons.append(reason)
        faults[(faults == 0) & hit] = len(reasons) - 1
    return faults, reasons

"""Conversations with one or more models that are asked the same questions. Without torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from megatron_ft.errors import ConfigError

Message = dict[str, str]


class _Sized(Protocol):
    def __len__(self) -> int: ...


Ids = TypeVar("Ids", bound=_Sized)


class Conversation:
    """system: the message at its start, or None. turns: of each model its own messages after that; the questions are the same."""

    def __init__(self, system: str | None = None, models: int = 1):
        self.system = system
        self.turns: list[list[Message]] = [[] for _ in range(models)]

    def ask(self, text: str) -> None:
        for turns in self.turns:
            turns.append({"role": "user", "content": text})

    def answer(self, model: int, text: str) -> None:
        self.turns[model].append({"role": "assistant", "content": text})

    def messages(self, model: int) -> list[Message]:
        """Return all messages, the system message first."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns[model]]

    def take_back(self) -> str | None:
        """Remove the last question and what follows it. Return the question; None if there is none."""
        questions = [i for i, turn in enumerate(self.turns[0]) if turn["role"] == "user"]
        if not questions:
            return None
        text = self.turns[0][questions[-1]]["content"]
        for turns in self.turns:
            del turns[questions[-1] :]
        return text

    def clear(self) -> None:
        for turns in self.turns:
            turns.clear()

    def saved(self, names: Sequence[str]) -> str:
        """Return the conversations as the pretokenizer reads them: of each model a line {"messages": [...], "model": its name}."""
        lines = [{"messages": self.messages(i), "model": name} for i, name in enumerate(names)]
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def fitted(
    messages: Sequence[Message], encode: Callable[[list[Message]], Ids], positions: int, max_new_tokens: int
) -> tuple[Ids, int]:
    """Return the ids of a conversation whose first questions and answers are left out until there is room for an answer, and the number
    of messages that were left out. A system message stays.

    Room is max_new_tokens, at most half of the positions; the last question may use all but one. Raise ConfigError if it has more.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = list(messages[len(system) :])
    room = min(max_new_tokens, positions // 2)
    for start in (i for i, turn in enumerate(turns) if turn["role"] == "user"):
        ids = encode([*system, *turns[start:]])
        is_last = not any(turn["role"] == "user" for turn in turns[start + 1 :])
        if len(ids) <= positions - (1 if is_last else room):
            return ids, start
    raise ConfigError(f"the message has {len(ids)} tokens, the model accepts up to {positions - 1}: shorten it")

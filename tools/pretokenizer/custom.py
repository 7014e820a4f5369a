"""Any shape of chat data, by its own keys: --keys question=prompt answer=completion system=instructions."""

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any

from megatron_ft.config.hints import suggestion
from megatron_ft.errors import ConfigError
from tools.pretokenizer import messages, pairs
from tools.pretokenizer.fields import Conversation, get_text, is_row, keep
from tools.pretokenizer.unread import ALL, MESSAGE, Reads, pair_reads

OF_PAIRS = ("question", "input", "answer", "system", "history", "context", "tools")
OF_CHATS = ("messages", "role", "content", "system", "tools")
NAMES = tuple(dict.fromkeys((*OF_PAIRS, *OF_CHATS, "text")))
WAYS = "question and answer, messages, or text"


@dataclass(frozen=True)
class KeysOptions:
    """The keys of a file."""

    keys: dict[str, str] | list[str] | str = ""
    """What the file's keys mean, as MEANING=KEY: question, input (a second part of the question), answer, system, history, context, tools;
    or messages, role, content; or text."""

    def __post_init__(self) -> None:
        if self.keys:
            meanings(self)  # a mistake is found before anything is read


@functools.cache
def _checked(pairs_given: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Return {meaning: the file's key}. Raise ConfigError for an unknown meaning, or too few."""
    found = dict(pairs_given)
    for name in found:
        if name not in NAMES:
            raise ConfigError(f"--keys {name}=...: unknown meaning{suggestion(name, NAMES)}; use {', '.join(NAMES)}")
    for own, others in ((OF_CHATS, "messages"), (("text",), "text"), (OF_PAIRS, "question")):
        if others in found:
            if left := [name for name in found if name not in own]:
                raise ConfigError(f"--keys: {left[0]} has no meaning beside {others}; name {WAYS}")
            if others == "question" and "answer" not in found:
                raise ConfigError(f"--keys: question is named, answer is not; name {WAYS}")
            return found
    raise ConfigError(f"--keys: {', '.join(found) or 'nothing'} is not enough; name {WAYS}")


def meanings(options: KeysOptions) -> dict[str, str]:
    """Return {meaning: the file's key}."""
    given = options.keys
    if not isinstance(given, dict):
        listed = [
            part for entry in ([given] if isinstance(given, str) else given) for part in entry.replace(",", " ").split()
        ]
        if wrong := next((entry for entry in listed if "=" not in entry.strip("=")), None):
            raise ConfigError(f"--keys {wrong}: write MEANING=KEY, for instance question=prompt answer=completion")
        pairs_given = [entry.split("=", 1) for entry in listed]
        given = dict(pairs_given)
        if len(given) < len(pairs_given):
            twice = next(name for i, (name, _) in enumerate(pairs_given) if name in dict(pairs_given[:i]))
            raise ConfigError(f"--keys {twice}=... is given twice; keep one of them")
    return _checked(tuple(given.items()))


def convert(record: dict[str, Any], where: str, options: KeysOptions, left_out: Counter[str]) -> list[Conversation]:
    """Read a record by the meanings of its keys."""
    found = meanings(options)
    if "text" in found:
        text = "" if is_row(where) and record.get(found["text"]) is None else get_text(record, found["text"], where)
        return keep([{"role": "text", "content": text, "marked": True}] if text else [], left_out)
    if "messages" in found:
        return keep(messages.chat(record, found["messages"], where, found), left_out)
    return keep(pairs.turns(record, _shape(options), where), left_out)


def reads(options: KeysOptions) -> Reads:
    """Return the keys that are read, see unread.py."""
    if not options.keys:
        return {}
    found = meanings(options)
    if "text" in found:
        return {found["text"]: ALL}
    if "messages" not in found:
        return pair_reads(_shape(options))
    message = {**MESSAGE, found.get("role", "role"): ALL, found.get("content", "content"): MESSAGE["content"]}
    beside = [found["system"]] if "system" in found else list(messages.SYSTEM)
    return {found["messages"]: message, **dict.fromkeys((*beside, found.get("tools", "tools"), "functions"), ALL)}


def _shape(options: KeysOptions) -> pairs.Pair:
    found = meanings(options)
    question = (found["question"], *([found["input"]] if "input" in found else []))
    more = {name: found[name] for name in ("system", "history", "context", "tools") if name in found}
    return pairs.Pair(question, found["answer"], **more)

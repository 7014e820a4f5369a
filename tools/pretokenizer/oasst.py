"""Reader of Open-Assistant message trees ("oasst export"): from a tree of alternative answers to conversations.

A tree is {message_tree_id, tree_state, prompt}; a message is {text, role, replies, rank, lang, deleted, synthetic, ...}.
A sample is a thread from the root to a leaf. If a thread ends with a message of the prompter, that message is removed, and the thread
is used only if the message is its parent's first reply, so that several unanswered questions after one answer do not repeat the answer.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_ft.errors import DataError, kind_of
from tools.pretokenizer.fields import get_text

Message = dict[str, Any]
Thread = tuple[Message, ...]
ANY_LANGUAGE = "*"  # of a tree in a table without languages


@dataclass(frozen=True)
class OasstOptions:
    """Selection of threads from the trees."""

    lang: str | list[str] = "en"
    """Languages of the first message, separated by commas."""
    top_k: int | None = None
    """Keep answers with a rank below this; an answer without a rank only if it is the only one."""
    include_synthetic: bool = False
    """Keep threads with messages written by a model."""

    @property
    def languages(self) -> list[str]:
        names = self.lang.split(",") if isinstance(self.lang, str) else self.lang
        return [name.strip() for name in names]


def conversations(tree: dict[str, Any], where: str, options: OasstOptions, left_out: Counter[str]) -> list[list[dict]]:
    """Return the samples of a tree, each a list of {"role", "content"}; [] for a tree that is left out.

    left_out: counts what is left out, by reason. Raise DataError for a tree or a message without a required key.
    """
    prompt = _field(tree, "prompt", where)
    if not isinstance(prompt, dict):
        raise DataError(
            f"{where}: the prompt is {kind_of(prompt)}, not a message; check that this is an Open-Assistant export"
        )
    reason = _unwanted_tree(tree, prompt, options)
    if reason:
        left_out[reason] += 1
        return []
    samples = []
    for thread in _threads(prompt, where):
        reason = _unwanted_thread(thread, options)
        if reason:
            left_out[reason] += 1
            continue
        messages = thread[:-1] if thread[-1]["role"] == "prompter" else thread
        samples.append([{"role": message["role"], "content": _text(message, where)} for message in messages])
    return samples


def _unwanted_tree(tree: dict[str, Any], prompt: Message, options: OasstOptions) -> str | None:
    if tree.get("tree_state") != "ready_for_export":
        return "tree not ready for export"
    if prompt.get("review_result") is not True:
        return "first message not approved"
    return None if prompt.get("lang") in (*options.languages, ANY_LANGUAGE) else "other language"


def _threads(root: Message, where: str) -> Iterator[Thread]:
    """Yield the threads from the root to every leaf, in the order of the file. It is a loop because trees may be deeper than
    Python's stack."""
    stack: list[Thread] = [(root,)]
    while stack:
        thread = stack.pop()
        _check_message(thread, where)
        replies = thread[-1].get("replies") or []
        if not isinstance(replies, list):
            raise DataError(
                f"{where}: replies are {kind_of(replies)}, not a list; check that this is an Open-Assistant export"
            )
        if not replies:
            yield thread
        stack.extend((*thread, reply) for reply in reversed(replies))


def _unwanted_thread(thread: Thread, options: OasstOptions) -> str | None:
    if any(message.get("deleted") for message in thread):
        return "deleted message"
    if not options.include_synthetic and any(message.get("synthetic") for message in thread):
        return "synthetic message"
    if options.top_k is not None and not all(_ranked(thread, i, options.top_k) for i in range(len(thread))):
        return f"not among the top {options.top_k}"
    if len(thread) == 1:
        return "no answer"
    if thread[-1]["role"] == "prompter" and thread[-2]["replies"][0] is not thread[-1]:
        return "unanswered question"
    return None


def _ranked(thread: Thread, index: int, top_k: int) -> bool:
    message = thread[index]
    if message["role"] != "assistant":
        return True
    if message.get("rank") is None:
        return index == 0 or len(thread[index - 1]["replies"]) == 1
    return message["rank"] < top_k


def _check_message(thread: Thread, where: str) -> None:
    """Raise DataError unless roles alternate, starting with the prompter, and ranks are numbers."""
    role, expected = _field(thread[-1], "role", where), ("prompter", "assistant")[(len(thread) - 1) % 2]
    if not isinstance(thread[-1].get("rank"), int | None):
        raise DataError(
            f"{where}: rank {thread[-1]['rank']!r} is not a number; check that this is an Open-Assistant export"
        )
    if role not in ("prompter", "assistant"):
        raise DataError(f"{where}: unknown role {role!r}; the roles of a tree are prompter and assistant")
    if role != expected:
        name = thread[-1].get("message_id", "?")
        raise DataError(
            f"{where}: message {name} is by the {role}, {expected} was expected; roles must alternate in a tree"
        )


def _text(message: Message, where: str) -> str:
    _field(message, "text", where)
    return get_text(message, "text", where)


def _field(message: Any, name: str, where: str) -> Any:
    if not isinstance(message, dict) or name not in message:
        raise DataError(f"{where}: a message lacks '{name}'; check that this is an Open-Assistant export")
    return message[name]

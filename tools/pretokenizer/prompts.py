"""Held-out chats as prompts: the first question of each and its answer, for `generate --prompts` and `finetune --sample_prompts`."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ft.data.roles import display_name
from megatron_ft.files import atomic_file
from tools.pretokenizer.fields import Conversation
from tools.pretokenizer.sampling import VAL
from tools.pretokenizer.sources import Source
from tools.pretokenizer.work import Worker

ENDING = "-prompts.jsonl"


def write_prompts(path: Path, sources: Iterable[Source], worker: Worker, most: int) -> None:
    """Write the first prompts of the validation split, at most so many: {"messages": [...], "answer": text} a line."""
    found = (prompt for chat in _held_out(sources, worker) if (prompt := as_prompt(chat)))
    with atomic_file(path, "w") as file:
        file.writelines(json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in islice(found, most))


def as_prompt(chat: Conversation) -> dict[str, Any] | None:
    """Return what precedes the first answer, and the answer; None for a chat without a question, an answer or text in them."""
    messages = [{"role": display_name(one["role"]), "content": one["content"]} for one in chat]
    at = next((i for i, one in enumerate(messages) if one["role"] == "assistant"), 0)
    asked = any(one["role"] == "user" for one in messages[:at])
    if not asked or any("tool_calls" in one for one in chat[: at + 1]):
        return None
    texts = [one["content"] for one in messages[: at + 1]]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        return None
    return {"messages": messages[:at], "answer": texts[-1]}


def _held_out(sources: Iterable[Source], worker: Worker) -> Iterator[Conversation]:
    """Yield the chats of the validation split, as the first pass assigned them."""
    for source in sources:
        assert source.plan is not None
        start = 0
        for chunk, count in zip(source.chunks(), source.per_chunk, strict=True):
            chosen = np.flatnonzero((source.plan.split[start : start + count] & 3) == VAL)
            start += count
            if len(chosen):
                chats = worker.chats(source.job, chunk)
                yield from (chats[i] for i in chosen)

"""Chats of shards, cut before their last answer: questions to a model, with the answer of the data beside them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_ft.data.loader import Samples
from megatron_ft.data.roles import ALL_NAMES, ROLE_BITS, display_name, last_turn
from megatron_ft.data.show import token_texts
from megatron_ft.data.tokenizer import Tokenizer
from megatron_ft.errors import UserError

Turn = tuple[str, int, int]
"""Role, first position and end."""
Frame = tuple[str, str]
"""What stands before and after the text of a turn, without control tokens."""
_ASKED = {"role": "user", "content": "z"}
_AROUND: dict[str, tuple[list, list]] = {"user": ([], []), "assistant": ([_ASKED], []), "system": ([], [_ASKED])}
LONGEST = 256
"""Tokens of a question; a longer one costs too much, and is too long to be read in a table."""
_CHAT = 4 * LONGEST
"""Tokens of a chat that is looked at."""
_TRIED = 16
"""Chats that are looked at for each question."""


@dataclass(frozen=True)
class Question:
    """prompt: ids that the model continues. answer: ids of the data's answer. turns: before it."""

    prompt: np.ndarray
    answer: np.ndarray
    turns: list[Turn]

    def messages(self, tokenizer: Tokenizer, frames: Mapping[str, Frame]) -> list[dict[str, str]]:
        """Return the turns as text, without control tokens and what frames_of() says of their roles."""
        texts, found = _texts(tokenizer, self.prompt), []
        for role, first, end in self.turns:
            before, after = frames.get(role, ("", ""))
            text = "".join(texts[first:end]).strip().removeprefix(before).removesuffix(after)
            found.append({"role": role, "content": text.strip()})
        return found


def choose(
    sets: Sequence[Samples], count: int, longest: int, opening: np.ndarray, stops: Sequence[int]
) -> list[Question]:
    """Return up to `count` questions, of chats at equal distances. It is the same choice for the same shards.

    longest: tokens of question and answer together that a row has room for. opening: ids that begin an answer, such as those of
    "<|im_start|>assistant". stops: ids that end one.
    """
    return list(itertools.islice(_fitting(sets, count * _TRIED, min(longest // 2, LONGEST), opening, stops), count))


def _fitting(
    sets: Sequence[Samples], tried: int, longest: int, opening: np.ndarray, stops: Sequence[int]
) -> Iterator[Question]:
    ends = np.cumsum([len(one) for one in sets])
    for index in _spread(int(ends[-1]) if len(ends) else 0, tried):
        number = int(np.searchsorted(ends, index, side="right"))
        one, at = sets[number], index - int(ends[number]) + len(sets[number])
        if one.lengths[at] > _CHAT:
            continue
        found = cut(one.tokens(at), one.role_bytes(at), opening, stops)
        if found and len(found.prompt) <= longest:
            yield found


def _spread(total: int, tried: int) -> list[int]:
    """Return indices over the whole range, each further one far from those before it."""
    if not total:
        return []
    step = round(total * 0.618)  # multiples of the golden ratio lie apart
    while math.gcd(step, total) > 1:
        step += 1
    return [number * step % total for number in range(min(tried, total))]


def cut(ids: np.ndarray, role_bytes: np.ndarray, opening: np.ndarray, stops: Sequence[int]) -> Question | None:
    """Return the question of a chat, None without an answer or one that begins otherwise than with `opening`."""
    start = last_turn(role_bytes)
    if start in (0, len(ids)):
        return None
    if len(opening) and not np.array_equal(ids[start - len(opening) : start], opening):
        shared = _shared(ids[start:], opening)  # its last token may be joined with the first of the answer
        if not shared:
            return None
        prompt, answer = np.concatenate([ids[:start], opening]), ids[start + shared :]
    else:
        prompt, answer = ids[:start], ids[start:]
    ended = np.flatnonzero(np.isin(answer, list(stops)))
    answer = answer[: ended[0]] if len(ended) else answer
    return Question(prompt, answer, _turns(role_bytes[:start])) if len(answer) else None


def _shared(a: np.ndarray, b: np.ndarray) -> int:
    """Return how many ids two sequences have in common at their start."""
    same = a[: len(b)] == b[: len(a)]
    return len(same) if same.all() else int(np.argmin(same))


def _turns(role_bytes: np.ndarray) -> list[Turn]:
    roles = role_bytes & ROLE_BITS
    edges = [0, *(np.flatnonzero(np.diff(roles)) + 1).tolist(), len(roles)]
    return [(display_name(ALL_NAMES[roles[first]]), first, end) for first, end in itertools.pairwise(edges)]


def _texts(tokenizer: Tokenizer, ids: np.ndarray) -> list[str]:
    """Return the text of each token, "" for control tokens."""
    controls = set(tokenizer.special_tokens.values())
    texts = token_texts(tokenizer, ids.tolist())
    return ["" if index in controls else text for index, text in zip(ids.tolist(), texts, strict=True)]


def frames_of(chat: Any, tokenizer: Tokenizer) -> dict[str, Frame]:
    """Return what a chat format puts around the text of a turn, by role, for the roles that it has: what is the same for two texts."""
    found = {}
    for role, (before, after) in _AROUND.items() if chat else ():
        try:
            one, other = [
                _turn_of(role, tokenizer, *chat.encode(tokenizer, [*before, {"role": role, "content": text}, *after]))
                for text in ("x", "y")
            ]
        except (UserError, StopIteration):
            continue
        before_text, after_text = _shared(one, other), _shared(one[::-1], other[::-1])
        found[role] = "".join(one[:before_text]).strip(), "".join(one[len(one) - after_text :]).strip()
    return found


def _turn_of(role: str, tokenizer: Tokenizer, ids: np.ndarray, role_bytes: np.ndarray) -> np.ndarray:
    """Return the letters of the first turn of a role."""
    first, end = next(turn[1:] for turn in _turns(role_bytes) if turn[0] == role)
    return np.array(list("".join(_texts(tokenizer, ids)[first:end])))


def opening_of(chat: Any, tokenizer: Tokenizer) -> np.ndarray:
    """Return the ids with which an answer begins in a chat format, [] for plain text."""
    if chat is None:
        return np.zeros(0, np.int32)
    asked = chat.encode(tokenizer, [_ASKED], add_generation_prompt=True)[0]
    ids, role_bytes = chat.encode(tokenizer, [_ASKED, {"role": "assistant", "content": "x"}])
    return asked[_shared(asked, ids[: last_turn(role_bytes)]) :]

"""A sample for display: its tokens with their text, role and loss weight.

Only data; the commands print it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ft.data.foreign import ForeignShards
from megatron_ft.data.roles import ALL_NAMES, MARKED, ROLE_BITS
from megatron_ft.data.shards import Shards
from megatron_ft.data.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"
"""At the end of a decoded text: bytes that are not a whole character."""


@dataclass(frozen=True)
class Token:
    """text: what the token adds to the text of the sample, None without a tokenizer; "" if it is part of a character that a later token
    completes. piece: its name in the vocabulary. weight: its loss weight; the first token of a sample is never predicted and has none."""

    id: int
    text: str | None
    piece: str | None
    role: str
    marked: bool
    control: bool
    weight: float


def tokens(
    shards: Shards | ForeignShards, sample: int, tokenizer: Tokenizer | None, weight_by_byte: np.ndarray
) -> list[Token]:
    """Return the tokens of a sample. weight_by_byte: float32 [256], from Shards.loss_weights."""
    ids, role_bytes = shards.tokens(sample), shards.role_bytes(sample)
    weights = weight_by_byte[role_bytes].copy()
    weights[:1] = 0
    names = set(tokenizer.special_tokens.values()) if tokenizer else set()
    texts = token_texts(tokenizer, ids.tolist()) if tokenizer else [None] * len(ids)
    return [
        Token(
            int(index),
            text,
            tokenizer.id_to_token(int(index)) if tokenizer else None,
            ALL_NAMES[role_byte & ROLE_BITS],
            bool(role_byte & MARKED),
            int(index) in names,
            float(weight),
        )
        for index, text, role_byte, weight in zip(ids, texts, role_bytes.tolist(), weights, strict=True)
    ]


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return what each token adds to the text of all.

    A character over several tokens (an emoji in bytes) belongs to the last of them. The space that a tokenizer puts before a text is not
    part of it, also after a control token such as <|im_start|>, where the tokenizer puts one there.
    """
    names = {index: name for name, index in tokenizer.special_tokens.items()}
    word = tokenizer.encode("x").tolist()
    adds_space = "".join(_run_texts(tokenizer, tokenizer.encode("x", at_start=False).tolist(), word)).startswith(" ")
    texts: list[str] = []
    start = 0
    for end in [*(at for at, index in enumerate(ids) if index in names), len(ids)]:
        run = list(_run_texts(tokenizer, ids[start:end], word if start else []))
        if start and adds_space:
            run = _without_first_space(run)
        texts += [*run, *(names[index] for index in ids[end : end + 1])]
        start = end + 1
    return texts


def _run_texts(tokenizer: Tokenizer, ids: Sequence[int], before: Sequence[int]) -> Iterator[str]:
    """Yield what each token adds to a text. before: tokens that the text follows, [] at the start, where decoders may drop a space.

    Decoded are only the tokens since the last but one that added text.
    """
    whole = [*before, *ids]
    window, done = 0, len(before)
    for end in range(done + 1, len(whole) + 1):
        earlier, text = tokenizer.decode(whole[window:done]), tokenizer.decode(whole[window:end])
        if len(text) <= len(earlier) or (text.endswith(_INCOMPLETE) and end < len(whole)):
            yield ""
            continue
        yield text[len(earlier) :]
        window, done = done, end


def _without_first_space(texts: list[str]) -> list[str]:
    first = next((at for at, text in enumerate(texts) if text), None)
    if first is None or not texts[first].startswith(" "):
        return texts
    return [*texts[:first], texts[first][1:], *texts[first + 1 :]]


def source_of(shards: Shards | ForeignShards, sample: int) -> str:
    """Return the dataset that a sample comes from."""
    for source in shards.manifest.sources:
        first, end = source["documents"]
        if first <= sample < end:
            return f"{source['name']} ({source['file']})"
    return "unknown"

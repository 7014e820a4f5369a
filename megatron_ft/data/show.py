"""A sample for display: its tokens with their text, role and loss weight.

Only data; the commands print it.
"""

import re
from dataclasses import dataclass

import numpy as np

from megatron_ft.data.foreign import ForeignShards
from megatron_ft.data.roles import ALL_NAMES, MARKED, ROLE_BITS
from megatron_ft.data.shards import Shards
from megatron_ft.data.tokenizer import Tokenizer

BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Token:
    """text: of the token, None without a tokenizer. weight: its loss weight; the first token of a sample is
    never predicted and has none."""

    id: int
    text: str | None
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
    return [
        Token(
            int(index),
            None if tokenizer is None else token_text(tokenizer, int(index)),
            ALL_NAMES[role_byte & ROLE_BITS],
            bool(role_byte & MARKED),
            int(index) in names,
            float(weight),
        )
        for index, role_byte, weight in zip(ids, role_bytes.tolist(), weights, strict=True)
    ]


def token_text(tokenizer: Tokenizer, index: int) -> str:
    """Return what one token looks like: spaces as spaces, a byte that is part of a character as <0x..>."""
    piece = tokenizer.id_to_token(index)
    if index in tokenizer.special_tokens.values():
        return piece
    if match := BYTE.fullmatch(piece):
        value = int(match[1], 16)
        return chr(value) if value < 128 else piece
    if "▁" in piece or tokenizer.kind == "sentencepiece":
        return piece.replace("▁", " ")
    return tokenizer.decode([index])


def source_of(shards: Shards | ForeignShards, sample: int) -> str:
    """Return the dataset that a sample comes from."""
    for source in shards.manifest.sources:
        first, end = source["documents"]
        if first <= sample < end:
            return f"{source['name']} ({source['file']})"
    return "unknown"

"""Sections about shards for a page: tokens by role, lengths, a few samples coloured by role."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ft.data.roles import ALL_NAMES, SYSTEM, display_name
from megatron_ft.data.shards import Shards
from megatron_ft.data.show import Token, tokens
from megatron_ft.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ft.errors import UserError
from megatron_ft.report.curves import bars
from megatron_ft.wording import counted

_LONGEST = 1500  # largest number of tokens shown of a sample


def by_role(shards: Sequence[Any], weight_by_byte: Sequence[np.ndarray]) -> str:
    """Return bars of the tokens of each role. weight_by_byte: for each set of shards the loss weight of every role byte, float32 [256]."""
    counts = dict.fromkeys(ALL_NAMES, 0)
    for shard in shards:
        for role in counts:
            counts[role] += shard.manifest.counts["tokens_by_role"].get(role, 0)
    weight = {
        name: max(float(role_bytes[role_byte]) for role_bytes in weight_by_byte)
        for role_byte, name in enumerate(ALL_NAMES)
    }
    return bars(
        [(display_name(role), count, f"{count:,} {_training(weight[role])}") for role, count in counts.items() if count]
    )


def _training(weight: float) -> str:
    return "not trained on" if weight == 0 else "trained on" if weight == 1 else f"trained on, weight {weight:g}"


def by_length(shards: Sequence[Any], unit: str = "sample") -> str:
    """Return bars of the samples' lengths in tokens."""
    lengths = np.concatenate([np.asarray(shard.lengths) for shard in shards])
    edges = np.unique(np.linspace(lengths.min(), lengths.max() + 1, 7).astype(int))
    counts, _ = np.histogram(lengths, bins=edges)
    return bars(
        [
            (f"{low:,} to {high - 1:,} tokens" if high - 1 > low else counted(low, "token"), float(n), counted(n, unit))
            for (low, high), n in zip(pairwise(edges), counts.tolist(), strict=True)
        ]
    )


def legend(shards: Sequence[Any]) -> str:
    """Return the roles that occur, each in its colour."""
    found = [r for r in ALL_NAMES if any(shard.manifest.counts["tokens_by_role"].get(r, 0) for shard in shards)]
    return " ".join(f'<span class="role {role}">{display_name(role)}</span>' for role in found)


def select(shards: Shards, count: int = 3) -> list[int]:
    """Return the indices of samples to show: one with a system message, if the first 1000 have one, and some at equal distances."""
    some = range(min(len(shards), 1000))
    with_system = next((i for i in some if len(shards.role_bytes(i)) and shards.roles(i)[0] == SYSTEM), 0)
    return sorted({with_system, *(len(shards) * i // count for i in range(1, count))})


def sample(shards: Shards, index: int, tokenizer: Tokenizer | None, weight_by_byte: np.ndarray) -> str:
    """Return one sample as text coloured by role, underlined where it is trained on."""
    parts: list[str] = []
    for run in _runs(tokens(shards, index, tokenizer, weight_by_byte)[:_LONGEST]):
        if text := _text(run).strip():
            trained = " on" if run[0].weight > 0 else ""
            parts.append(f'<span class="role {run[0].role}{trained}">{escape(text)}</span>')
    cut = len(shards.role_bytes(index)) - _LONGEST
    more = f'<br><span class="soft">and {counted(cut, "more token")}</span>' if cut > 0 else ""
    return f'<div class="chat">{"<br>".join(parts)}{more}</div>'


def _runs(all_tokens: Sequence[Token]) -> list[list[Token]]:
    """Return successive tokens with the same role, all trained on or all not."""
    runs: list[list[Token]] = []
    for token in all_tokens:
        if runs and (runs[-1][0].role, runs[-1][0].weight > 0) == (token.role, token.weight > 0):
            runs[-1].append(token)
        else:
            runs.append([token])
    return runs


def _text(run: Sequence[Token]) -> str:
    return "".join(f"{token.id} " if token.text is None else token.text for token in run)


def tokenizer_of(shards: Shards, *places: Path) -> Tokenizer | None:
    """Return the tokenizer that the shards were made with: from the path in their manifest, else from one of the places (a
    checkpoint's copy). Return None if it is in none; samples are then shown as ids.
    """
    recorded = shards.manifest.tokenizer
    for place in filter(None, (recorded.get("file"), *places)):
        try:
            tokenizer = load_tokenizer(place, list(recorded.get("added_tokens", {})), recorded.get("fingerprint"))
        except UserError:
            continue
        if tokenizer.fingerprint == recorded.get("fingerprint"):
            return tokenizer
    return None

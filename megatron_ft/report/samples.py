"""What is in shards, for a page: tokens by role, lengths, a few samples in the colours of their roles."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ft.data.roles import ROLE_NAMES, SYSTEM
from megatron_ft.data.shards import Shards
from megatron_ft.data.show import Token, tokens
from megatron_ft.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ft.errors import UserError
from megatron_ft.report.curves import bars

_LONGEST = 1500  # tokens of a sample that are shown


def by_role(shards: Sequence[Any], by_code: Sequence[np.ndarray]) -> str:
    """Bars of the tokens of each role. by_code: of each shard set, the loss weight of every role byte, float32 [256]."""
    counts = dict.fromkeys(ROLE_NAMES, 0)
    for shard in shards:
        for role in counts:
            counts[role] += shard.manifest.counts["tokens_by_role"].get(role, 0)
    weight = {name: max(float(codes[code]) for codes in by_code) for code, name in enumerate(ROLE_NAMES)}
    return bars([(role, count, f"{count:,} {_fate(weight[role])}") for role, count in counts.items() if count])


def _fate(weight: float) -> str:
    return "read only" if weight == 0 else "trained on" if weight == 1 else f"trained on, weight {weight:g}"


def by_length(shards: Sequence[Any], unit: str = "samples") -> str:
    """Bars of the samples' lengths in tokens."""
    lengths = np.concatenate([np.asarray(shard.lengths) for shard in shards])
    edges = np.unique(np.linspace(lengths.min(), lengths.max() + 1, 7).astype(int))
    counts, _ = np.histogram(lengths, bins=edges)
    return bars(
        [
            (f"{low:,} to {high - 1:,} tokens" if high - 1 > low else f"{low:,} tokens", float(n), f"{n:,} {unit}")
            for (low, high), n in zip(pairwise(edges), counts.tolist(), strict=True)
        ]
    )


def key(shards: Sequence[Any]) -> str:
    """The roles that occur, each in its colour."""
    found = [r for r in ROLE_NAMES if any(shard.manifest.counts["tokens_by_role"].get(r, 0) for shard in shards)]
    return " ".join(f'<span class="role {role}">{role}</span>' for role in found)


def chosen(shards: Shards, count: int = 3) -> list[int]:
    """Numbers of samples worth showing: one with a system message, where the first thousand have one, and some from all over."""
    some = range(min(len(shards), 1000))
    with_system = next((i for i in some if len(shards.codes(i)) and shards.roles(i)[0] == SYSTEM), 0)
    return sorted({with_system, *(len(shards) * i // count for i in range(1, count))})


def sample(shards: Shards, index: int, tokenizer: Tokenizer | None, by_code: np.ndarray) -> str:
    """One sample as text in the colours of its roles, underlined where it is trained on."""
    parts: list[str] = []
    for run in _runs(tokens(shards, index, tokenizer, by_code)[:_LONGEST]):
        text = _text(run, tokenizer).strip("\n")
        if text.strip():
            trained = " on" if run[0].weight > 0 else ""
            parts.append(f'<span class="role {run[0].role}{trained}">{escape(text.strip())}</span>')
    cut = len(shards.codes(index)) - _LONGEST
    more = f'<br><span class="soft">and {cut:,} more tokens</span>' if cut > 0 else ""
    return f'<div class="chat">{"<br>".join(parts)}{more}</div>'


def _runs(all_tokens: Sequence[Token]) -> list[list[Token]]:
    """Neighbours of one role and one fate."""
    runs: list[list[Token]] = []
    for token in all_tokens:
        if runs and (runs[-1][0].role, runs[-1][0].weight > 0) == (token.role, token.weight > 0):
            runs[-1].append(token)
        else:
            runs.append([token])
    return runs


def _text(run: Sequence[Token], tokenizer: Tokenizer | None) -> str:
    ids = [token.id for token in run]
    return " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)


def reader_of(shards: Shards, *places: Path) -> Tokenizer | None:
    """The tokenizer that the shards were made with: where their manifest says, else in one of the places (a checkpoint's
    copy); else None, and samples are shown as ids.
    """
    said = shards.manifest.tokenizer
    for place in filter(None, (said.get("file"), *places)):
        try:
            tokenizer = load_tokenizer(place, list(said.get("added_tokens", {})))
        except UserError:
            continue
        if tokenizer.fingerprint == said.get("fingerprint"):
            return tokenizer
    return None

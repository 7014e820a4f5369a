"""Perplexity by length of the context: the same tokens are scored at every length.

A document is cut into blocks of `stride` tokens. Each block is scored by one window that ends with it and begins up to `length` tokens
before that end. So only the context differs between lengths. The first token of a document has no context and is not scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ft.data.roles import ALL_NAMES, ROLE_BITS
from megatron_ft.engine.parallel import Layout
from megatron_ft.evaluation.scoring import Scorer


@dataclass(frozen=True)
class Document:
    """One text or one sample of shards."""

    ids: np.ndarray
    source: str
    roles: np.ndarray | None = None
    """role byte of each token, where known"""


@dataclass(frozen=True)
class Window:
    """ids[start:end] of a document, of which those from `scored` on count."""

    document: int
    start: int
    scored: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass
class Sum:
    """Nats and the number of tokens that they were summed over."""

    nats: float = 0.0
    tokens: int = 0

    def add(self, nats: float, tokens: int) -> None:
        self.nats, self.tokens = self.nats + nats, self.tokens + tokens

    def as_json(self) -> dict[str, Any]:
        """Return the sum with its perplexity; None is a perplexity that no float holds."""
        mean = self.nats / self.tokens
        return {"tokens": self.tokens, "nats": self.nats, "perplexity": math.exp(mean) if mean < 700 else None}


@dataclass
class Sums:
    """Those of one length: of all tokens, of each role, of each source."""

    all: Sum = field(default_factory=Sum)
    roles: dict[str, Sum] = field(default_factory=dict)
    sources: dict[str, Sum] = field(default_factory=dict)

    def add(self, document: Document, window: Window, nats: np.ndarray) -> None:
        """Add the nats of a window's scored tokens."""
        self.all.add(float(nats.sum()), len(nats))
        self.sources.setdefault(document.source, Sum()).add(float(nats.sum()), len(nats))
        if document.roles is not None:
            roles = document.roles[window.scored : window.end] & ROLE_BITS
            for role in np.unique(roles):
                some = nats[roles == role]
                self.roles.setdefault(ALL_NAMES[role], Sum()).add(float(some.sum()), len(some))

    def join(self, other: Sums) -> None:
        """Add another rank's sums."""
        self.all.add(other.all.nats, other.all.tokens)
        for mine, theirs in ((self.roles, other.roles), (self.sources, other.sources)):
            for name, one in theirs.items():
                mine.setdefault(name, Sum()).add(one.nats, one.tokens)


def windows(sizes: Sequence[int], length: int, stride: int) -> list[Window]:
    """Return the windows of documents of these sizes. A window has at most `length` tokens and scores at most `stride` of them."""
    assert 0 < stride < length
    found = []
    for number, size in enumerate(sizes):
        for scored in range(1, size, stride):
            end = min(scored + stride, size)
            found.append(Window(number, max(0, end - length), scored, end))
    return found


def batches(all_windows: Sequence[Window], size: int, pads: bool) -> Iterator[list[Window]]:
    """Yield windows of similar length together. pads: False allows only windows of equal length in a batch."""
    batch: list[Window] = []
    for window in sorted(all_windows, key=lambda one: one.length):
        if batch and (len(batch) == size or (not pads and window.length != batch[0].length)):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def measure(
    scorer: Scorer, documents: Sequence[Document], length: int, stride: int, layout: Layout, batch_size: int, pads: bool
) -> Sums:
    """Return the sums of all documents, the same on every rank. Data-parallel ranks take every dp_size-th batch.

    pads: whether a window may be padded at its end, which rotary embeddings that follow the length of the row do not allow.
    """
    sums = Sums()
    todo = list(batches(windows([len(one.ids) for one in documents], length, stride), batch_size, pads))
    for batch in todo[layout.dp_rank :: layout.dp_size]:
        rows = torch.zeros(len(batch), max(window.length for window in batch), dtype=torch.long)
        for row, window in zip(rows, batch, strict=True):
            ids = documents[window.document].ids[window.start : window.end]
            row[: window.length] = torch.from_numpy(ids.astype(np.int64))
        log_probs = scorer.score(rows).log_probs.double().cpu().numpy()
        for scores, window in zip(log_probs, batch, strict=True):
            nats = -scores[window.scored - window.start - 1 : window.length - 1]
            sums.add(documents[window.document], window, nats)
    return _joined(sums, layout)


def _joined(sums: Sums, layout: Layout) -> Sums:
    shares: list[Any] = [None] * layout.dp_size
    dist.all_gather_object(shares, sums, group=parallel_state.get_data_parallel_group())
    whole = Sums()
    for share in shares:
        whole.join(share)
    return whole

"""Zeros in the MLPs of a model over documents, and the loss of the same tokens.

A document is cut into pieces of `length` tokens, which do not see each other. Every token but the last of a document is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ft.engine.parallel import Layout
from megatron_ft.evaluation.perplexity import Document, Window, batches
from megatron_ft.evaluation.scoring import Scorer
from megatron_ft.models.sparsity import Shares, ZeroCounts


@dataclass(frozen=True)
class Found:
    """What a model computed."""

    shares: Shares
    nats: float
    tokens: int

    def as_json(self) -> dict[str, Any]:
        shares = self.shares
        return {
            "tokens": self.tokens,
            "loss": self.nats / self.tokens,
            "zeros": shares.overall,
            "near_zero": shares.near_overall,
            "layers": [
                {"layer": number, "zeros": zeros, "near_zero": near}
                for number, (zeros, near) in enumerate(zip(shares.layers, shares.near_layers, strict=True))
            ],
        }


def pieces(sizes: Sequence[int], length: int, most: int | None = None) -> list[Window]:
    """Return windows that compute `length` tokens each, and score the tokens after them. most: stop when that many tokens are computed."""
    found = [
        Window(number, start, start + 1, min(start + length + 1, size))
        for number, size in enumerate(sizes)
        for start in range(0, size - 1, length)
    ]
    if most is None:
        return found
    before = accumulate((window.length - 1 for window in found), initial=0)
    return [window for window, done in zip(found, before, strict=False) if done < most]


def measure(
    model: Any, documents: Sequence[Document], windows: Sequence[Window], layout: Layout, batch_size: int, pads: bool
) -> Found:
    """Return the shares and the loss, the same on every rank. Data-parallel ranks take every dp_size-th batch.

    pads: whether a window may be padded at its end, as in perplexity.measure.
    """
    counts, scorer = ZeroCounts([model], model.config.num_layers, near=True), Scorer(model, layout)
    sums = torch.zeros(2, dtype=torch.float64)  # nats, tokens
    for batch in list(batches(windows, batch_size, pads))[layout.dp_rank :: layout.dp_size]:
        rows = torch.zeros(len(batch), max(window.length for window in batch), dtype=torch.long)
        for row, window in zip(rows, batch, strict=True):
            ids = documents[window.document].ids[window.start : window.end]
            row[: window.length] = torch.from_numpy(ids.astype(np.int64))
        sizes = torch.tensor([window.length - 1 for window in batch])
        real = torch.arange(rows.shape[1] - 1) < sizes[:, None]
        with counts.counting(real.to(scorer.device)):
            log_probs = scorer.score(rows).log_probs.double().cpu()
        sums += torch.stack([-(log_probs * real).sum(), sizes.sum().double()])
    sums = sums.to(scorer.device)
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    nats, tokens = sums.tolist()
    return Found(counts.shares(), nats, int(tokens))

"""The k most likely tokens at every place of a text, with the probability of all others: what is stored of a teacher."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ft.data.pieces import Pieces
from megatron_ft.data.teacher_logits import starts_of
from megatron_ft.data.unfinished_logits import Journal
from megatron_ft.engine.parallel import Layout
from megatron_ft.evaluation.scoring import Scorer
from megatron_ft.models.distilled_loss import Columns, highest


class TopScorer(Scorer):
    """Scores rows: ids, log-probabilities and tail of each token's place, as 2k + 1 numbers."""

    def __init__(self, model: Any, layout: Layout, top_k: int, temperature: float):
        super().__init__(model, layout)
        self.top_k, self.temperature, self.numbers = top_k, temperature, 2 * top_k + 1

    def of_logits(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return [2k + 1, b, s]: ids, log-probabilities (falling), tail."""
        group = parallel_state.get_tensor_model_parallel_group()
        rank = Columns.of(logits.shape[-1], self.model.true_vocab_size, group)
        rows = logits.flatten(0, 1).float() / self.temperature
        rows[:, rank.valid :] = -torch.inf
        peak = highest(rows, rank.valid)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
        shifted = rows - peak[:, None]
        values, ids = self._top(shifted, rank)
        exp = shifted.exp()
        total = exp.sum(-1)
        mine = (ids >= rank.first) & (ids < rank.first + rank.valid)
        columns = (ids - rank.first).where(mine, 0)
        tail = exp.scatter_reduce_(1, columns, torch.where(mine, 0.0, torch.inf), "amin").sum(-1)
        sums = torch.stack([total, tail])
        dist.all_reduce(sums, group=group)
        total, tail = sums
        found = torch.cat([ids.float(), values - total.log()[:, None], (tail / total)[:, None]], 1)
        return found.t().view(self.numbers, *logits.shape[:2])

    def _top(self, shifted: Tensor, rank: Columns) -> tuple[Tensor, Tensor]:
        """Return the k largest of all ranks' columns and their ids, [n, k], the same on every rank."""
        own = min(self.top_k, shifted.shape[1])
        values, columns = shifted.topk(own, -1)
        pair = torch.stack([values, (columns + rank.first).float()])
        parts = [torch.empty_like(pair) for _ in range(rank.group.size())]
        dist.all_gather(parts, pair.contiguous(), group=rank.group)
        values, ids = torch.cat(parts, -1)
        best, at = values.topk(self.top_k, -1)
        return best, ids.gather(1, at).long()


def score_pieces(
    scorer: TopScorer, shards: Any, rows: Path, kind: np.dtype, pieces: Pieces, left: np.ndarray, batch_size: int
) -> None:
    """Write the rows of the pieces whose numbers are `left` to `rows`, which exists on every machine. All ranks call it."""
    layout, places = scorer.layout, places_of(shards, pieces)
    writes = layout.tp_rank == 0 and layout.pp_rank == 0
    with contextlib.closing(Journal(rows)) if writes else contextlib.nullcontext() as journal:
        for batch in list(_batches(pieces, left, batch_size))[layout.dp_rank :: layout.dp_size]:
            found = scorer.of_tokens(_tokens(shards, pieces, batch)).cpu().numpy()
            if journal is None:
                continue
            for number, piece in enumerate(batch.tolist()):
                data = _rows(found[:, number, : pieces.size[piece]], kind).tobytes()
                journal.write(piece, data, int(places[piece]) * kind.itemsize)


def places_of(shards: Any, pieces: Pieces) -> np.ndarray:
    """Return the row of each piece's first token that has a distribution."""
    return starts_of(shards)[pieces.sample] + pieces.start + 1


def _batches(pieces: Pieces, left: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Yield pieces of similar length together, the longest first: those batches of all pieces in which some are left.

    So each is computed beside the same others, whatever was done before, and has the same rounding.
    """
    order = np.argsort(-pieces.size, kind="stable")
    is_left = np.isin(order, left)
    starts = (first for first in range(0, len(order), batch_size) if is_left[first : first + batch_size].any())
    return (order[first : first + batch_size] for first in starts)


def _tokens(shards: Any, pieces: Pieces, batch: np.ndarray) -> Tensor:
    """Return the pieces as rows, padded to the right; attention is causal."""
    rows = torch.zeros(len(batch), int(pieces.size[batch].max()) + 1, dtype=torch.long)
    for row, piece in zip(rows, batch.tolist(), strict=True):
        start, size = int(pieces.start[piece]), int(pieces.size[piece]) + 1
        row[:size] = torch.from_numpy(shards.tokens(int(pieces.sample[piece]))[start : start + size].astype(np.int64))
    return rows


def _rows(found: np.ndarray, kind: np.dtype) -> np.ndarray:
    """Return the rows of a piece. found [2k + 1, s]."""
    top_k = len(found) // 2
    rows = np.zeros(found.shape[1], kind)
    rows["ids"], rows["log_probs"], rows["tail"] = found[:top_k].T, found[top_k : 2 * top_k].T, found[-1]
    return rows

"""The k most likely tokens at every place of a text, with the probability of all others: what is stored of a teacher."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ft.data.pieces import Pieces, pieces_of
from megatron_ft.data.shards import Shards
from megatron_ft.data.teacher_logits import UNKNOWN, row_type
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


def score_shards(
    scorer: TopScorer, shards: Shards, path: Path, vocab_size: int, seq_length: int, over_long: str, batch_size: int
) -> None:
    """Write the rows of all tokens of `shards` to `path`, which exists on every machine. All ranks call it."""
    kind, layout = row_type(scorer.top_k, vocab_size), scorer.layout
    starts = np.concatenate([[0], np.cumsum(shards.lengths, dtype=np.int64)])
    pieces = pieces_of(np.asarray(shards.lengths), seq_length, over_long)
    writes = layout.tp_rank == 0 and layout.pp_rank == 0
    handle = os.open(path, os.O_WRONLY) if writes else -1
    try:
        for batch in list(_batches(pieces, batch_size))[layout.dp_rank :: layout.dp_size]:
            found = scorer.of_tokens(_tokens(shards, pieces, batch)).cpu().numpy()
            for number, piece in enumerate(batch.tolist() if writes else []):
                rows = _rows(found[:, number, : pieces.size[piece]], kind)
                place = int(starts[pieces.sample[piece]] + pieces.start[piece] + 1)
                _write(handle, rows.tobytes(), place * kind.itemsize)
        if writes:
            os.fsync(handle)
    finally:
        if writes:
            os.close(handle)


def _batches(pieces: Pieces, batch_size: int) -> Iterator[np.ndarray]:
    """Yield pieces of similar length together, the longest first."""
    order = np.argsort(-pieces.size, kind="stable")
    return (order[first : first + batch_size] for first in range(0, len(order), batch_size))


def _tokens(shards: Shards, pieces: Pieces, batch: np.ndarray) -> Tensor:
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


def _write(handle: int, data: bytes, place: int) -> None:
    while data:
        count = os.pwrite(handle, data, place)
        data, place = data[count:], place + count


def write_unknown(path: Path, tokens: int, kind: np.dtype) -> None:
    """Write rows without a distribution for so many tokens."""
    row = np.zeros(1, kind)
    row["tail"] = UNKNOWN
    each = max(1, (1 << 22) // kind.itemsize)
    with path.open("xb") as file:
        for first in range(0, tokens, each):
            file.write(row.tobytes() * min(each, tokens - first))

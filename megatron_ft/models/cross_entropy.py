"""Cross entropy over a vocabulary that tensor-parallel ranks share, without a copy of the logits in fp32.

The engine's function (0.16 and 0.19) keeps one from the forward to the backward pass: for 128K entries and 8,192 positions 4.2 GB,
besides 2.1 GB of logits in bf16. Here the logits are kept, with two numbers per position, and the softmax is computed again for the
gradient. Entries beyond the true vocabulary are not used and not written to: a write into a slice would copy the whole gradient.

Compiled (GPU), each of the three passes reads the logits once and keeps nothing; otherwise they are processed in pieces of CHUNK bytes.
Without compilation the result is bit-identical to the engine's unfused function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK = 1 << 21
"""Bytes of logits in fp32 that are processed at once without compilation: the size of a CPU's cache."""
CHUNK_ON_GPU = 1 << 26


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, vocab_size: int, group: Any, fused: bool = False
) -> Tensor:
    """Return the loss of each token, [s, b] fp32, in nats.

    logits [s, b, v]: this rank's columns, ranks in order. labels [s, b] int64, over all of them. vocab_size: columns of all ranks that
    count. group: the ranks that share the vocabulary. fused: use compiled kernels.
    """
    width = logits.shape[-1]
    first = width * group.rank()
    valid = min(width, max(0, vocab_size - first))
    return _CrossEntropy.apply(logits, labels - first, valid, group, fused)


class _CrossEntropy(torch.autograd.Function):
    """targets [s, b]: the labels counted from this rank's first column; those outside of [0, v) are other ranks'."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, valid: int, group: Any, fused: bool) -> Tensor:
        rows, flat = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
        steps = _steps(fused)
        peak = joined(steps.peak(rows[part], valid) for part in pieces(rows, fused))
        reduce_over(peak, dist.ReduceOp.MAX, group)
        found = [steps.sums(rows[part], flat[part], peak[part], valid) for part in pieces(rows, fused)]
        total, predicted = (joined(values) for values in zip(*found, strict=True))
        reduce_over(predicted, dist.ReduceOp.SUM, group)
        reduce_over(total, dist.ReduceOp.SUM, group)
        ctx.save_for_backward(logits, targets, peak, total)
        ctx.valid, ctx.fused = valid, fused
        return (torch.log(total) - predicted).view(targets.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, peak, total = ctx.saved_tensors
        rows, flat, factor = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), grad.reshape(-1)
        gradient = _steps(ctx.fused).gradient
        out = torch.empty_like(rows)
        for part in pieces(rows, ctx.fused):
            gradient(out[part], rows[part], flat[part], peak[part], total[part], factor[part], ctx.valid)
        return out.view(logits.shape), None, None, None, None


def pieces(rows: Tensor, fused: bool) -> Iterator[slice]:
    """Cut [n, v] into pieces of at most CHUNK bytes in fp32; compiled kernels take it whole."""
    size = CHUNK if rows.device.type == "cpu" else CHUNK_ON_GPU
    each = max(1, rows.shape[0] if fused else size // (4 * rows.shape[1]))
    return (slice(start, start + each) for start in range(0, rows.shape[0], each))


def joined(parts: Iterable[Tensor]) -> Tensor:
    parts = list(parts)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def reduce_over(values: Tensor, how: Any, group: Any) -> None:
    if group.size() > 1:
        dist.all_reduce(values, op=how, group=group)


class _Steps(NamedTuple):
    """The three passes over logits. rows [n, v], targets, peak, total and factor [n]; valid: columns that count, the first ones."""

    peak: Callable[..., Tensor]
    """(rows, valid) -> the largest logit, fp32 [n]; -inf where no column counts."""
    sums: Callable[..., tuple[Tensor, Tensor]]
    """(rows, targets, peak, valid) -> the sum of exp(logit - peak), and logit - peak of the target (0 where it is another rank's)."""
    gradient: Callable[..., None]
    """(out, rows, targets, peak, total, factor, valid): write (softmax - one-hot) x factor into out."""


@functools.cache
def _steps(fused: bool) -> _Steps:
    if not fused:
        return _Steps(_peak, _sums, _gradient)
    return _Steps(
        torch.compile(_peak_fused, dynamic=True),
        torch.compile(_sums_fused, dynamic=True),
        torch.compile(_gradient_fused, dynamic=True),
    )


def _peak(rows: Tensor, valid: int) -> Tensor:
    if not valid:
        return torch.full(rows.shape[:1], float("-inf"), device=rows.device)
    return rows[:, :valid].amax(-1).float()


def shifted_by(rows: Tensor, peak: Tensor, valid: int) -> Tensor:
    """Return rows - peak in fp32, a new tensor; -inf in columns that do not count."""
    shifted = rows - peak[:, None]
    shifted[:, valid:] = float("-inf")
    return shifted


def _sums(rows: Tensor, targets: Tensor, peak: Tensor, valid: int) -> tuple[Tensor, Tensor]:
    shifted = shifted_by(rows, peak, valid)
    mine = (targets >= 0) & (targets < rows.shape[1])
    predicted = shifted.gather(1, targets.where(mine, 0)[:, None])[:, 0]
    return shifted.exp_().sum(-1), predicted.where(mine, 0.0)


def _gradient(
    out: Tensor, rows: Tensor, targets: Tensor, peak: Tensor, total: Tensor, factor: Tensor, valid: int
) -> None:
    softmax = shifted_by(rows, peak, valid).exp_().div_(total[:, None])
    mine = (targets >= 0) & (targets < rows.shape[1])
    softmax.scatter_add_(1, targets.where(mine, 0)[:, None], -mine[:, None].to(softmax.dtype))
    out.copy_(softmax.mul_(factor[:, None]))


# The same without a write into part of a tensor, so that each becomes one kernel without its own [n, v].


def _peak_fused(rows: Tensor, valid: int) -> Tensor:
    return rows.float().where(_counts(rows, valid), float("-inf")).amax(-1)


def _counts(rows: Tensor, valid: int) -> Tensor:
    return torch.arange(rows.shape[1], device=rows.device) < valid


def _softmax_fused(rows: Tensor, peak: Tensor, valid: int) -> Tensor:
    return (rows.float() - peak[:, None]).exp().where(_counts(rows, valid), 0.0)


def _sums_fused(rows: Tensor, targets: Tensor, peak: Tensor, valid: int) -> tuple[Tensor, Tensor]:
    mine = (targets >= 0) & (targets < rows.shape[1])
    predicted = rows.gather(1, targets.where(mine, 0)[:, None])[:, 0].float() - peak
    return _softmax_fused(rows, peak, valid).sum(-1), predicted.where(mine, 0.0)


def _gradient_fused(
    out: Tensor, rows: Tensor, targets: Tensor, peak: Tensor, total: Tensor, factor: Tensor, valid: int
) -> None:
    softmax = _softmax_fused(rows, peak, valid) / total[:, None]
    hit = torch.arange(rows.shape[1], device=rows.device) == targets[:, None]
    out.copy_((softmax - hit.float()) * factor[:, None])

"""Cross entropy and the KL divergence from a teacher, over a vocabulary that tensor-parallel ranks share.

loss = a CE + b T^2 KL(teacher || student), where both distributions of the KL are at temperature T (Hinton et al. 2015). With the logits
shifted by their maximum and divided by T, s and t, and d = sum e^t (t - s): KL = d / Z_p - log Z_p + log Z_q. The gradient is
a (q_1 - one-hot) + b T (q_T - p_T). Between ranks pass two numbers a position (maxima), then five (sums).

Like models/cross_entropy.py it keeps no logits in fp32: positions are processed in pieces, and the gradient is written into the memory of
the student's logits, which nothing reads after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ft.models.cross_entropy import joined, pieces, reduce_over, shifted_by


@dataclass(frozen=True)
class Mix:
    """The weights of the two losses, and the temperature of the KL divergence."""

    ce_weight: float = 1.0
    kd_weight: float = 1.0
    temperature: float = 1.0


class Target(Protocol):
    """What the student is compared with, for the positions of a microbatch as one list, [n]. `part`: some of them."""

    def peak(self, part: slice, valid: int) -> Tensor | None:
        """Return what `shift` needs the maximum of over all ranks, fp32 [n]; None: nothing."""

    def sums(self, part: slice, scaled: Tensor, peak: Tensor | None, rank: Columns, mix: Mix) -> list[Tensor]:
        """Return two numbers a position, [n] each, that are added up over the ranks. scaled [n, v]: the student's s."""

    def divergence(self, log_z: Tensor, sums: list[Tensor]) -> Tensor:
        """Return the KL divergence [n] in nats. log_z [n]: log Z_q."""

    def subtract(
        self, part: slice, q: Tensor, peak: Tensor | None, sums: list[Tensor], z: Tensor, rank: Columns, mix: Mix
    ) -> None:
        """Subtract the target distribution from the student's, q [n, v], in place. z [n]: Z_q."""


@dataclass(frozen=True)
class Columns:
    """The columns of the vocabulary on this rank: `first` is the number of the first one, the first `valid` count."""

    first: int
    valid: int
    group: Any

    @classmethod
    def of(cls, width: int, vocab_size: int, group: Any) -> Columns:
        first = width * group.rank()
        return cls(first, min(width, max(0, vocab_size - first)), group)


def distilled_loss(
    logits: Tensor, labels: Tensor, target: Target, vocab_size: int, group: Any, mix: Mix
) -> Tensor:  # fmt: skip
    """Return [3, s, b] fp32 in nats: the loss, the cross entropy, the KL divergence. Only the first has a gradient.

    logits [s, b, v]: the student's, this rank's columns, ranks in order; they are overwritten by the backward pass. labels [s, b] int64.
    vocab_size: columns of all ranks that count. group: the ranks that share the vocabulary.
    """
    return _Distilled.apply(logits, labels, target, Columns.of(logits.shape[-1], vocab_size, group), mix)


class _Distilled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, target: Target, rank: Columns, mix: Mix) -> Tensor:
        rows, targets = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1) - rank.first
        peak, theirs = _peaks(rows, target, rank)
        found = []
        for part in pieces(rows, False):
            mine = None if theirs is None else theirs[part]
            found.append(_sums(rows[part], targets[part], peak[part], part, mine, target, rank, mix))
        sums = torch.cat(found, 1)
        reduce_over(sums, dist.ReduceOp.SUM, rank.group)
        z_1, predicted, z_q, *others = sums.unbind()
        ce = z_1.log() - predicted
        kl = target.divergence(z_q.log(), others)
        ctx.save_for_backward(logits, targets, peak, sums, *([] if theirs is None else [theirs]))
        ctx.target, ctx.rank, ctx.mix = target, rank, mix
        total = mix.ce_weight * ce + mix.kd_weight * mix.temperature**2 * kl
        return torch.stack([total, ce, kl]).view(3, *labels.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, peak, sums, *others = ctx.saved_tensors
        theirs = others[0] if others else None
        rows, factor = logits.reshape(-1, logits.shape[-1]), grad[0].reshape(-1)
        for part in pieces(rows, False):
            mine = None if theirs is None else theirs[part]
            g = _gradient(rows[part], targets[part], peak[part], part, mine, sums[:, part], ctx)
            rows[part] = g.mul_(factor[part, None]).to(rows.dtype)
        return rows.view(logits.shape), None, None, None, None


def _peaks(rows: Tensor, target: Target, rank: Columns) -> tuple[Tensor, Tensor | None]:
    """Return the largest logit of the student at every position, and of the teacher, over all ranks."""
    found = []
    for part in pieces(rows, False):
        theirs = target.peak(part, rank.valid)
        mine = highest(rows[part], rank.valid)
        found.append(torch.stack([mine] if theirs is None else [mine, theirs]).t())
    peaks = joined(found)
    reduce_over(peaks, dist.ReduceOp.MAX, rank.group)
    peak, *others = peaks.unbind(1)
    return peak, others[0] if others else None


def highest(rows: Tensor, valid: int) -> Tensor:
    """Return the largest logit of each row [n, v] among the columns that count, fp32 [n]; -inf where there is none."""
    if not valid:
        return torch.full(rows.shape[:1], float("-inf"), device=rows.device)
    return rows[:, :valid].amax(-1).float()


def _sums(
    rows: Tensor, targets: Tensor, peak: Tensor, part: slice, theirs: Tensor | None, target: Target, rank: Columns, mix: Mix
) -> Tensor:  # fmt: skip
    """Return what is added up over the ranks, [5, n]: Z at temperature 1, the label's logit, Z_q, and two numbers of the target."""
    shifted = shifted_by(rows, peak, rank.valid)
    mine = (targets >= 0) & (targets < rows.shape[1])
    predicted = shifted.gather(1, targets.where(mine, 0)[:, None])[:, 0].where(mine, 0.0)
    scaled = shifted if mix.temperature == 1 else shifted / mix.temperature
    others = target.sums(part, scaled, theirs, rank, mix)
    z_q = scaled.exp().sum(-1)
    z_1 = z_q if mix.temperature == 1 else shifted.exp_().sum(-1)
    return torch.stack([z_1, predicted, z_q, *others])


def _gradient(
    rows: Tensor, targets: Tensor, peak: Tensor, part: slice, theirs: Tensor | None, sums: Tensor, ctx: Any
) -> Tensor:
    """Return the gradient of the loss on some positions' logits, fp32 [n, v]."""
    target, rank, mix = ctx.target, ctx.rank, ctx.mix
    z_1, _, z_q, *others = sums.unbind()
    shifted = shifted_by(rows, peak, rank.valid)
    difference = (shifted if mix.temperature == 1 else shifted / mix.temperature).exp().div_(z_q[:, None])
    target.subtract(part, difference, theirs, others, z_q, rank, mix)
    softmax = shifted.exp_().div_(z_1[:, None])
    mine = (targets >= 0) & (targets < rows.shape[1])
    softmax.scatter_add_(1, targets.where(mine, 0)[:, None], -mine[:, None].to(softmax.dtype))
    return softmax.mul_(mix.ce_weight).add_(difference, alpha=mix.kd_weight * mix.temperature)


@dataclass(frozen=True)
class Logits:
    """A teacher's own logits, [n, v]: this rank's columns, as the student's."""

    rows: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> Logits:
        return cls(logits.reshape(-1, logits.shape[-1]))

    def peak(self, part: slice, valid: int) -> Tensor:
        return highest(self.rows[part], valid)

    def _scaled(self, part: slice, peak: Tensor, rank: Columns, mix: Mix) -> Tensor:
        shifted = shifted_by(self.rows[part], peak, rank.valid)
        return shifted if mix.temperature == 1 else shifted / mix.temperature

    def sums(self, part: slice, scaled: Tensor, peak: Tensor | None, rank: Columns, mix: Mix) -> list[Tensor]:
        """Return Z_p and d."""
        assert peak is not None
        t = self._scaled(part, peak, rank, mix)
        p = t.exp()
        difference = t[:, : rank.valid] - scaled[:, : rank.valid]
        return [p.sum(-1), (p[:, : rank.valid] * difference).sum(-1)]

    def divergence(self, log_z: Tensor, sums: list[Tensor]) -> Tensor:
        z_p, d = sums
        return d / z_p - z_p.log() + log_z

    def subtract(
        self, part: slice, q: Tensor, peak: Tensor | None, sums: list[Tensor], z: Tensor, rank: Columns, mix: Mix
    ) -> None:
        assert peak is not None
        q.sub_(self._scaled(part, peak, rank, mix).exp().div_(sums[0][:, None]))


@dataclass(frozen=True)
class TopK:
    """The most likely tokens of a teacher and the probability of all others together, the tail.

    KL = sum over k of p log(p / q) + p_tail log(p_tail / q_tail), a lower bound of the whole. The target of a token in the tail is
    q p_tail / q_tail: the teacher says nothing about the proportions within. ids [n, k] int64; p [n, k] and tail [n] fp32, at the
    temperature of the KL, whose sum is 1.
    """

    ids: Tensor
    p: Tensor
    tail: Tensor

    @classmethod
    def of(cls, ids: Tensor, log_probs: Tensor, tail: Tensor) -> TopK:
        """Return the target of stored numbers, whose log-probabilities are rounded: their sum becomes 1 - tail again."""
        p = log_probs.float().exp()
        p = p * ((1 - tail) / p.sum(-1).clamp(min=1e-30))[:, None]
        return cls(ids, p, tail)

    def peak(self, part: slice, valid: int) -> None:
        return None

    def _here(self, part: slice, rank: Columns) -> tuple[Tensor, Tensor]:
        """Return (columns of the tokens, 0 for those of other ranks; which are this rank's), [n, k]."""
        columns = self.ids[part] - rank.first
        mine = (columns >= 0) & (columns < rank.valid)
        return columns.where(mine, 0), mine

    def sums(self, part: slice, scaled: Tensor, peak: Tensor | None, rank: Columns, mix: Mix) -> list[Tensor]:
        """Return sum over k of p s, and the sum of e^s of the tail."""
        columns, mine = self._here(part, rank)
        known = scaled.gather(1, columns).where(mine, 0.0)
        return [(self.p[part] * known).sum(-1), self._in_tail(scaled.exp(), columns, mine).sum(-1)]

    @staticmethod
    def _in_tail(values: Tensor, columns: Tensor, mine: Tensor) -> Tensor:
        """Return values [n, v] with those of the top k set to 0, in place."""
        # Column 0 stands for tokens of other ranks: it keeps its value unless it is one of the top k itself.
        return values.scatter_reduce_(1, columns, torch.where(mine, 0.0, torch.inf), "amin")

    def divergence(self, log_z: Tensor, sums: list[Tensor]) -> Tensor:
        dot, in_tail = sums
        known = torch.special.xlogy(self.p, self.p).sum(-1) + torch.special.xlogy(self.tail, self.tail)
        return known - dot - torch.special.xlogy(self.tail, in_tail.clamp(min=1e-38)) + log_z

    def subtract(
        self, part: slice, q: Tensor, peak: Tensor | None, sums: list[Tensor], z: Tensor, rank: Columns, mix: Mix
    ) -> None:
        columns, mine = self._here(part, rank)
        share = self.tail[part] * z / sums[1].clamp(min=1e-38)  # p_tail / q_tail
        target = self._in_tail(q.clone(), columns, mine).mul_(share[:, None])
        target.scatter_add_(1, columns, self.p[part].where(mine, 0.0))
        q.sub_(target)

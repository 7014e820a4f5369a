"""The loss: a weighted sum over tokens, divided by the global sum of weights.

A mean of per-microbatch means is wrong as soon as microbatches hold different numbers of supervised tokens. So every microbatch
contributes its plain sum, and gradients are scaled once by 1 / (sum of weights over all microbatches and data-parallel ranks).
"""

from __future__ import annotations

import torch
from megatron.core.distributed import finalize_model_grads


class GlobalWeight:
    """Adds up the loss weights of one step, microbatch by microbatch, and scales the gradients by their global sum.

    megatron-core counts tokens in integers; loss weights may be fractions (--scalar_loss_mask 0.1), so the sum is kept here and handed over
    when the engine finalises the gradients.
    """

    def __init__(self):
        self.total: torch.Tensor | None = None

    def start_step(self, device: torch.device) -> None:
        self.total = torch.zeros([], dtype=torch.float32, device=device)

    def add(self, weights: torch.Tensor) -> None:
        self.total += weights.sum()

    def finalize(self, model, num_tokens=None, pg_collection=None, force_all_reduce=False):
        """The engine's finalize_model_grads_func: reduces gradients over the ranks, then divides by the global weight."""
        finalize_model_grads(model, self.total, pg_collection=pg_collection, force_all_reduce=force_all_reduce)


def weighted_sum(losses: torch.Tensor, weights: torch.Tensor, groups: torch.Tensor, sizes: list[int]):
    """What the engine's schedule wants of a microbatch: (sum to differentiate, integer token count, log entry).

    Losses and weights [b, s]; groups [breakdowns, b, s] as the loader gives them, sizes the number of groups in each. The log entry
    is a fresh fp64 tensor (the schedule divides the first in place): sum of losses, sum of weights, then for each breakdown the
    plain loss sums and token counts of its groups, tokens of weight 0 included.
    """
    losses = losses.float()
    total = (losses * weights).sum()
    parts = [torch.stack([total.detach(), weights.sum()])]
    for group, size in zip(groups.flatten(1), sizes, strict=True):
        sums = torch.zeros(2, size + 1, device=losses.device)  # padding, -1, falls into the last place and is dropped
        sums.index_add_(
            1, group % (size + 1), torch.stack([losses.detach().flatten(), torch.ones_like(group, dtype=sums.dtype)])
        )
        parts.append(sums[:, :-1].flatten())
    return total, (weights > 0).sum().int(), torch.cat(parts).double()


def breakdown(log: list[float], names: dict[str, tuple[str, ...]]) -> dict[str, float]:
    """Mean loss of every group that has tokens: {"loss_by_role/assistant": 1.2, ...}, from the tail of summed log entries."""
    means, at = {}, 0
    for kind, groups in names.items():
        sums, counts = log[at : at + len(groups)], log[at + len(groups) : at + 2 * len(groups)]
        means |= {f"loss_by_{kind}/{name}": s / n for name, s, n in zip(groups, sums, counts, strict=True) if n}
        at += 2 * len(groups)
    return means

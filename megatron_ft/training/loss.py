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


def weighted_sum(losses: torch.Tensor, weights: torch.Tensor):
    """Losses and weights [b, s] -> what the engine's schedule wants: (sum to differentiate, integer token count, log entry).

    The log entry is a fresh tensor [sum of losses, sum of weights]: the schedule divides the first in place.
    """
    total = (losses.float() * weights).sum()
    log = torch.stack([total.detach(), weights.sum()])
    return total, (weights > 0).sum().int(), log

"""The sum of all loss weights of a step, by which its gradients are divided once."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads


class GlobalWeight:
    """Adds up the weights of one step, microbatch by microbatch, and scales the gradients by their global sum.

    megatron-core counts tokens in integers; loss weights may be fractions (--scalar_loss_mask 0.1), so the sum is kept here and handed over
    when the engine finalises the gradients.
    """

    def __init__(self) -> None:
        self.total = torch.zeros([])

    def start_step(self, device: torch.device) -> None:
        self.total = torch.zeros([], dtype=torch.float32, device=device)

    def add(self, weight: torch.Tensor) -> None:
        """weight: scalar fp32, of one microbatch."""
        self.total += weight

    def finalize(
        self, model: list, num_tokens: Any = None, pg_collection: Any = None, force_all_reduce: bool = False
    ) -> None:
        """The engine's finalize_model_grads_func: reduces gradients over the ranks, then divides by the global weight."""
        finalize_model_grads(model, self.total, pg_collection=pg_collection, force_all_reduce=force_all_reduce)

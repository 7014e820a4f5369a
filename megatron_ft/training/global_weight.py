"""The sum of all loss weights of a step, by which its gradients are divided once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads


class GlobalWeight:
    """Adds up the weights of one step, microbatch by microbatch, and scales the gradients by their global sum.

    megatron-core counts tokens in integers, and since 0.19 divides by 1 where it counted less. Loss weights may be fractions
    (--scalar_loss_mask 0.1), so they are summed here, and gradients divided here once the engine has reduced them.
    """

    def __init__(self, before: Callable[[], None] | None = None) -> None:
        """before: called before gradients are reduced."""
        self.total, self.before = torch.zeros([]), before

    def start_step(self, device: torch.device) -> None:
        self.total = torch.zeros([], dtype=torch.float32, device=device)

    def add(self, weight: torch.Tensor) -> None:
        """Add the weight of one microbatch: a scalar fp32."""
        self.total += weight

    def finalize(
        self, model: list, num_tokens: Any = None, pg_collection: Any = None, force_all_reduce: bool = False
    ) -> None:
        """Reduce gradients over the ranks, then divide by the global weight. This is the engine's finalize_model_grads_func."""
        if self.before:
            self.before()
        finalize_model_grads(model, None, pg_collection=pg_collection, force_all_reduce=force_all_reduce)
        self._sum_over_ranks()
        if self.total > 0:
            for chunk in model:
                chunk.scale_gradients(1.0 / self.total)

    def _sum_over_ranks(self) -> None:
        """Make it the last stage's sum, which has the loss, over all replicas."""
        stages = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast(self.total, parallel_state.get_pipeline_model_parallel_last_rank(), stages)
        dist.all_reduce(self.total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))

"""Log-probabilities of given tokens, in any tensor x pipeline layout.

The forward-only schedule of the engine runs the model without a KV cache. The logits stay split over the vocabulary; only the
log-probability of each token leaves the last stage, and every rank of the model receives it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ft import device
from megatron_ft.engine.parallel import Layout
from megatron_ft.models.cross_entropy import vocab_parallel_cross_entropy


class Scores(NamedTuple):
    """Of each token after the first of a row, [b, s - 1]."""

    log_probs: Tensor
    """fp32, in nats"""
    greedy: Tensor
    """whether it is the most likely token, the first one of several"""


class Scorer:
    """Scores rows of tokens with an unwrapped model without sequence parallelism, whose weights are loaded."""

    def __init__(self, model: Any, layout: Layout):
        assert not model.config.sequence_parallel, "rows of any length cannot be split along the sequence"
        self.model, self.layout = model.eval(), layout
        self.device = device.current_device()
        members = dist.get_process_group_ranks(parallel_state.get_model_parallel_group())
        self.last_rank = members[-layout.tp_size]

    @torch.no_grad()
    def score(self, rows: Tensor) -> Scores:
        """Return the scores of rows [b, s] int64, s at least 2. All ranks of a model call it with the same rows.

        A token is scored with the tokens before it in its row, so padding at the end of a row changes nothing before it.
        """
        rows = rows.to(self.device)
        inputs, targets = rows[:, :-1], rows[:, 1:]
        outputs = get_forward_backward_func()(
            forward_step_func=lambda _, model: (self._forward(model, inputs), _pass_through),
            data_iterator=iter(()),
            model=[self.model],
            num_microbatches=1,
            seq_length=inputs.shape[1],
            micro_batch_size=len(inputs),
            forward_only=True,
            collect_non_loss_data=True,
        )
        found = torch.zeros(2, *targets.shape, device=self.device)
        if outputs:
            found = torch.stack(self._of_logits(outputs[0], targets))
        dist.broadcast(found, src=self.last_rank, group=parallel_state.get_model_parallel_group())
        return Scores(found[0], found[1].bool())

    def _forward(self, model: Any, inputs: Tensor) -> Tensor:
        return model(inputs, torch.arange(inputs.shape[1], device=self.device).expand_as(inputs), None)

    def _of_logits(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and greedy (0 or 1) of this model's targets. logits [b, s, v / TP]: this rank's columns."""
        group = parallel_state.get_tensor_model_parallel_group()
        losses = vocab_parallel_cross_entropy(logits, targets, self.model.true_vocab_size, group)
        return -losses, (most_likely(logits, self.model.true_vocab_size, group) == targets).float()


def most_likely(logits: Tensor, vocab_size: int, group: Any) -> Tensor:
    """Return the most likely id, [b, s], of several the lowest. logits: as vocab_parallel_cross_entropy takes them."""
    width = logits.shape[-1]
    first = width * group.rank()
    valid = min(width, max(0, vocab_size - first))
    if valid:
        peak, where = logits[..., :valid].float().max(-1)
    else:
        peak, where = (
            torch.full(logits.shape[:-1], -torch.inf, device=logits.device),
            logits.new_zeros((), dtype=torch.long),
        )
    highest = peak.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    ids = torch.where(peak == highest, where + first, vocab_size)
    dist.all_reduce(ids, op=dist.ReduceOp.MIN, group=group)
    return ids


def _pass_through(output: Tensor, non_loss_data: bool = False) -> Tensor:
    return output

"""Log-probabilities of given tokens, in any tensor x pipeline layout.

The forward-only schedule of the engine runs the model without a KV cache. The last stage computes logits in pieces along the
sequence, of at most PIECE bytes in fp32, which stay split over the vocabulary. Only the log-probability of each token leaves it, and
every rank of the model receives that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_ft import device
from megatron_ft.engine.parallel import Layout
from megatron_ft.models.cross_entropy import vocab_parallel_cross_entropy

PIECE = 1 << 28
"""Bytes of logits in fp32 that are held at once."""


class Scores(NamedTuple):
    """Of each token after the first of a row, [b, s - 1]."""

    log_probs: Tensor
    """fp32, in nats"""
    greedy: Tensor
    """whether it is the most likely token, the first one of several"""


class Scorer:
    """Scores rows of tokens with an unwrapped model without sequence parallelism, whose weights are loaded."""

    numbers = 2
    """of each token, that leave the last stage"""

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
        found = self.of_tokens(rows)
        return Scores(found[0], found[1].bool())

    @torch.no_grad()
    def of_tokens(self, rows: Tensor) -> Tensor:
        """Return the numbers of each token after the first, [numbers, b, s - 1] fp32."""
        rows = rows.to(self.device)
        inputs, targets = rows[:, :-1], rows[:, 1:]
        outputs = get_forward_backward_func()(
            forward_step_func=lambda _, model: (self._forward(model, inputs, targets), _pass_through),
            data_iterator=iter(()),
            model=[self.model],
            num_microbatches=1,
            seq_length=inputs.shape[1],
            micro_batch_size=len(inputs),
            forward_only=True,
            collect_non_loss_data=True,
        )
        found = outputs[0] if outputs else torch.zeros(self.numbers, *targets.shape, device=self.device)
        dist.broadcast(found, src=self.last_rank, group=parallel_state.get_model_parallel_group())
        return found

    def _forward(self, model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return what a stage hands on; of the last stage the numbers of each token, [numbers, b, s]."""
        positions = torch.arange(inputs.shape[1], device=self.device).expand_as(inputs)
        if not model.post_process:
            return model(inputs, positions, None)
        with _without_logits(model) as output:
            hidden = model(inputs, positions, None)
        size = max(1, PIECE // (4 * len(inputs) * self._columns))
        pieces = zip(hidden.split(size, 1), targets.split(size, 1), strict=True)
        return torch.cat([self._of_hidden(output, piece, those) for piece, those in pieces], -1)

    @property
    def _columns(self) -> int:
        """Return the columns of the logits that a rank holds."""
        return -(-self.model.vocab_size // self.layout.tp_size)

    def _of_hidden(self, output: _Output, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the numbers of a piece. hidden [b, s, h]: what the output layer reads."""
        return self.of_logits(output.logits(hidden.transpose(0, 1)).transpose(0, 1), targets)

    def of_logits(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return of each token its log-probability, and 1 where it is greedy. logits [b, s, v / TP], targets [b, s]."""
        group = parallel_state.get_tensor_model_parallel_group()
        losses = vocab_parallel_cross_entropy(logits, targets, self.model.true_vocab_size, group)
        return torch.stack([-losses, (most_likely(logits, self.model.true_vocab_size, group) == targets).float()])


class _Output(torch.nn.Module):
    """Takes the place of the output layer: returns its input, and computes the logits of parts of it later."""

    def __init__(self, layer: Any):
        super().__init__()
        self.layer, self.weight = layer, layer.weight
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden: Tensor, **arguments: Any) -> tuple[Tensor, None]:
        self.arguments = arguments
        return hidden, None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return this rank's columns, [s, b, v / TP]. hidden [s, b, h]."""
        return self.layer(hidden, **self.arguments)[0]


@contextmanager
def _without_logits(model: Any) -> Iterator[_Output]:
    """Let the model return the output layer's input, [b, s, h], in place of logits."""
    layer = model.output_layer
    model.output_layer = _Output(layer)
    try:
        yield model.output_layer
    finally:
        model.output_layer = layer


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

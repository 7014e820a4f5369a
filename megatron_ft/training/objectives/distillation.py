"""Knowledge distillation: cross-entropy of the next token, and the KL divergence from a teacher's distribution of it.

The teacher is resident (the model is a `Pair`), or the dataset has its stored log-probabilities (`Inputs.top`). Without either, as in an
evaluation on shards that were not scored, the loss is the cross-entropy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_ft.data.loader import ChatDataset
from megatron_ft.models.cross_entropy import vocab_parallel_cross_entropy
from megatron_ft.models.distilled_loss import Logits, Mix, Target, TopK, distilled_loss
from megatron_ft.training.inputs import Inputs
from megatron_ft.training.objectives.cross_entropy import CrossEntropy, breakdown, weighted_sum
from megatron_ft.training.objectives.objective import Contribution

PARTS = ("loss", "ce", "kl")
"""What is logged: the loss that is minimised, the cross-entropy, the KL divergence; in nats per token."""


@dataclass(frozen=True)
class Distillation:
    """sum(weight x (a CE + b T^2 KL)) / sum(weight)."""

    mix: Mix = field(default_factory=Mix)

    def forward(self, model: torch.nn.Module, batch: Inputs) -> Tensor:
        """Return [3, b, s] on the last stage: see PARTS."""
        loss_of = partial(_loss_of, mix=self.mix, batch=batch)
        return model(
            batch.tokens, batch.position_ids, None, labels=batch.labels, packed_seq_params=batch.rows, loss_of=loss_of
        )

    def weight(self, batch: Inputs) -> Tensor:
        return batch.weights.sum()

    def contribution(self, output: Tensor, batch: Inputs, dataset: ChatDataset) -> Contribution:
        sizes = [len(names) for names in dataset.group_names.values()]
        total, *others = (weighted_sum(losses, batch.weights, batch.groups, sizes) for losses in output)
        return total._replace(log=torch.cat([total.log, *(one.log for one in others)]))

    def log_size(self, dataset: ChatDataset) -> int:
        return len(PARTS) * CrossEntropy().log_size(dataset)

    def read(self, log: list[float], dataset: ChatDataset) -> tuple[float, dict[str, float]]:
        """Return the mean loss, and the means of its parts: ce, kl, and each by role, source and position."""
        size = CrossEntropy().log_size(dataset)
        found: dict[str, float] = {}
        for number, name in enumerate(PARTS):
            total, weight, *rest = log[number * size : (number + 1) * size]
            means = {
                f"{name}_{key.removeprefix('loss_')}": v for key, v in breakdown(rest, dataset.group_names).items()
            }
            found |= {
                key: value
                for key, value in {name: total / max(weight, 1e-12), **means}.items()
                if not math.isnan(value)
            }
        return found.pop("loss"), found | {"perplexity": math.exp(min(found["ce"], 700))}


def _loss_of(
    logits: Tensor, labels: Tensor, vocab_size: int, group: Any, mix: Mix, batch: Inputs, theirs: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Return [3, b, s]. theirs: the logits of a resident teacher."""
    target = _target(theirs, batch)
    if target is None:  # the cross-entropy alone; `read` leaves out a KL divergence that is not a number
        ce = vocab_parallel_cross_entropy(logits, labels, vocab_size, group)
        losses = torch.stack([ce, ce.detach(), torch.full_like(ce, math.nan)])
    else:
        losses = distilled_loss(logits, labels, target, vocab_size, group, mix)
    return losses.transpose(1, 2).contiguous()


def _target(theirs: Tensor | None, batch: Inputs) -> Target | None:
    if theirs is not None:
        return Logits.of(theirs)
    if not batch.top:
        return None
    ids, log_probs, tail = batch.top
    by_position = [x.transpose(1, 2).flatten(1).t() for x in (ids.long(), log_probs)]
    return TopK.of(by_position[0], by_position[1], tail.t().flatten())

"""Cross-entropy of the next token, each token with its loss weight: supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ft.data.loader import ChatDataset
from megatron_ft.training.inputs import Inputs
from megatron_ft.training.objectives.objective import Contribution


@dataclass(frozen=True)
class CrossEntropy:
    """The objective of fine-tuning on chats: sum(weight x -log p(label)) / sum(weight), in nats per token."""

    def forward(self, model: torch.nn.Module, batch: Inputs) -> Tensor:
        """Return the loss per token [b, s] on the last stage."""
        return model(batch.tokens, batch.position_ids, None, labels=batch.labels, packed_seq_params=batch.rows)

    def weight(self, batch: Inputs) -> Tensor:
        return batch.weights.sum()

    def contribution(self, output: Tensor, batch: Inputs, dataset: ChatDataset) -> Contribution:
        sizes = [len(names) for names in dataset.group_names.values()]
        return weighted_sum(output, batch.weights, batch.groups, sizes)

    def log_size(self, dataset: ChatDataset) -> int:
        return 2 + 2 * sum(len(names) for names in dataset.group_names.values())

    def read(self, log: list[float], dataset: ChatDataset) -> tuple[float, dict[str, float]]:
        loss, weight, *rest = log
        return loss / max(weight, 1e-12), breakdown(rest, dataset.group_names)


def weighted_sum(losses: Tensor, weights: Tensor, groups: Tensor, sizes: list[int]) -> Contribution:
    """Return the contribution of a microbatch.

    losses, weights: [b, s]. groups: [breakdowns, b, s] from the loader. sizes: the number of groups in each breakdown. The log
    entry: sum of weighted losses, sum of weights, then for each breakdown the plain loss sums and token counts of its groups, tokens of
    weight 0 included.
    """
    losses = losses.float()
    total = (losses * weights).sum()
    parts = [torch.stack([total.detach(), weights.sum()])]
    for group, size in zip(groups.flatten(1), sizes, strict=True):
        # Padding (-1) is counted in the last entry, which is dropped.
        sums = torch.zeros(2, size + 1, device=losses.device)
        sums.index_add_(
            1, group % (size + 1), torch.stack([losses.detach().flatten(), torch.ones_like(group, dtype=sums.dtype)])
        )
        parts.append(sums[:, :-1].flatten())
    return Contribution(total, (weights > 0).sum().int(), torch.cat(parts).double())


def breakdown(log: list[float], names: dict[str, tuple[str, ...]]) -> dict[str, float]:
    """Return the mean loss of every group that has tokens: {"loss_by_role/assistant": 1.2, ...}. log: summed, from its third value on."""
    means: dict[str, float] = {}
    at = 0
    for kind, groups in names.items():
        sums, counts = log[at : at + len(groups)], log[at + len(groups) : at + 2 * len(groups)]
        means |= {f"loss_by_{kind}/{name}": s / n for name, s, n in zip(groups, sums, counts, strict=True) if n}
        at += 2 * len(groups)
    return means

"""The interface of an objective: what a model computes for a microbatch, what is minimised, and what is logged.

The minimised value is a sum over the global batch, divided by the global sum of weights. A mean of per-microbatch means is wrong if
microbatches have different numbers of supervised tokens.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_ft.data.loader import ChatDataset
from megatron_ft.training.inputs import Inputs


class Contribution(NamedTuple):
    """The contribution of one microbatch to a step, in the form that the engine's schedule expects."""

    total: Tensor
    """Scalar to differentiate: a sum, not a mean. The schedule divides it in place."""
    tokens: Tensor
    """Scalar int32: supervised tokens."""
    log: Tensor
    """[log_size] fp64, without gradient. Summed over microbatches and data-parallel ranks, then passed to `read`."""


class Objective(Protocol):
    """One objective. It has no state between microbatches; `dataset` is the source of the rows."""

    def forward(self, model: torch.nn.Module, batch: Inputs) -> Tensor:
        """Run a chunk of this rank's stage. Return what the next stage takes, and on the last one what `contribution` takes."""

    def weight(self, batch: Inputs) -> Tensor:
        """Return the scalar fp32 weight of a microbatch. Gradients are divided by its sum over the global batch."""

    def contribution(self, output: Tensor, batch: Inputs, dataset: ChatDataset) -> Contribution:
        """Return what a microbatch adds. Called on the last pipeline stage. output: of `forward`."""

    def log_size(self, dataset: ChatDataset) -> int:
        """Return the number of values in a log entry."""

    def read(self, log: list[float], dataset: ChatDataset) -> tuple[float, dict[str, float]]:
        """Return (mean loss, more metrics by name) from the log entries of a global batch, summed."""

"""Counts zeros in the MLPs: at the input of the down projection, for every layer, in any layout.

What ReLU makes zero needs no row of the down projection, so the share of exact zeros says what sparse decoding can skip. Other activations
have hardly any; how many of their values are near zero is counted by size: at most NEAR of the token's largest value in that layer.
Counting reads activations and changes nothing. A recomputed forward pass is not counted again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ft import device

NEAR = 0.01
"""Largest share of the largest value, of those that count as near zero."""


@dataclass(frozen=True)
class Shares:
    """Shares from 0 to 1, of all layers in order and of the whole model. Exact zeros are near zero too."""

    layers: list[float]
    overall: float
    near_layers: list[float]
    near_overall: float

    def metrics(self) -> dict[str, float]:
        """Return the shares of exact zeros with the names of docs/metrics.md. Layers are counted from 0."""
        width = len(str(len(self.layers) - 1))
        by_layer = {f"sparsity_by_layer/{n:0{width}d}": share for n, share in enumerate(self.layers)}
        return {"sparsity": self.overall, **by_layer}


class ZeroCounts:
    """Counts on this rank, in the layers of these chunks. near: also count values near zero, which takes an exchange a layer with TP."""

    def __init__(self, chunks: Sequence[Any], num_layers: int, near: bool = False):
        self.near = near
        self.sums = torch.zeros(num_layers, 3, dtype=torch.float64, device=device.current_device())
        """Of each layer: values, zeros, values near zero."""
        self._real: Tensor | None = None
        for layer in _layers(chunks):
            layer.mlp.linear_fc2.register_forward_pre_hook(partial(self._count, layer.layer_number - 1))

    def start(self) -> None:
        """Forget what was counted."""
        self.sums.zero_()

    @contextmanager
    def counting(self, real: Tensor) -> Iterator[None]:
        """Count the forward passes in this context. real [b, s]: which positions hold a token, not padding."""
        self._real = real.transpose(0, 1)
        try:
            yield
        finally:
            self._real = None

    def shares(self) -> Shares:
        """Return the shares over all ranks. A collective: all ranks call it."""
        sums = self.sums.clone()
        dist.all_reduce(sums)
        values, *counts = sums.cpu().unbind(1)
        zeros, near = ((count / values.clamp(min=1)).tolist() for count in counts)
        whole = [float(count.sum() / values.sum().clamp(min=1)) for count in counts]
        return Shares(zeros, whole[0], near, whole[1])

    @torch.no_grad()
    def _count(self, layer: int, _: Any, inputs: tuple) -> None:
        if self._real is None:
            return
        x, real = inputs[0].detach(), self._real  # [s, b, f / TP], [s, b]
        counts = [real.sum() * x.shape[-1], (real * (x.shape[-1] - x.count_nonzero(-1))).sum()]
        if self.near:
            counts.append((real * (x.abs() <= NEAR * _largest(x)).sum(-1)).sum())
        self.sums[layer, : len(counts)] += torch.stack(counts)


def _largest(x: Tensor) -> Tensor:
    """Return the largest size of a token's values, [s, b, 1], over tensor-parallel ranks."""
    largest = x.abs().amax(-1, keepdim=True)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=parallel_state.get_tensor_model_parallel_group())
    return largest


def _layers(chunks: Sequence[Any]) -> Iterator[Any]:
    """Yield the layers with an MLP that is not made of experts."""
    for chunk in chunks:
        for module in chunk.modules():
            if hasattr(module, "layer_number") and hasattr(getattr(module, "mlp", None), "linear_fc2"):
                yield module

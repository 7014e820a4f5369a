"""RMSNorm and LayerNorm that work under sequence parallelism.

megatron-core's plain-torch norm refuses sequence parallelism, because the gradients of its weight would lack a sum over the
tensor-parallel ranks. The engine computes this sum for parameters that are marked `sequence_parallel`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension. Input and output [..., h]. (Zhang & Sennrich 2019)"""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.eps = eps
        self.weight = _parameter(torch.ones(hidden_size, dtype=config.params_dtype), config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Mean and variance normalisation with weight and bias over the last dimension. Input and output [..., h]."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.eps = eps
        self.weight = _parameter(torch.ones(hidden_size, dtype=config.params_dtype), config)
        self.bias = _parameter(torch.zeros(hidden_size, dtype=config.params_dtype), config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def _parameter(values: torch.Tensor, config: Any) -> nn.Parameter:
    """Return a parameter that is marked for the engine, which sums the gradients of such over a tensor-parallel group."""
    parameter: Any = nn.Parameter(values)
    parameter.sequence_parallel = config.sequence_parallel
    return parameter


NORMS = {"rmsnorm": ("RMSNorm", RMSNorm), "layernorm": ("LayerNorm", LayerNorm)}
"""Architecture.norm -> (megatron-core's name, module)."""

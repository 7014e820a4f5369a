"""The activation of a gated MLP, act(gate) * up, that keeps its input and nothing else for the backward pass.

The engine's own keeps act(gate) and a copy of up too, and the gradients of gate and up are put together by a copy. The numbers are the
same, bit for bit; act(gate) is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Gradient = Callable[[Tensor, Tensor, Tensor], Tensor]
"""f(gradient of the activation, its input, out)"""

_aten = torch.ops.aten


def relu2(x: Tensor) -> Tensor:
    """Return the square of ReLU, as transformers' activation of that name."""
    return functional.relu(x).square()


GRADIENTS: dict[Any, Gradient] = {
    functional.silu: lambda gradient, x, out: _aten.silu_backward.grad_input(gradient, x, grad_input=out),
    functional.gelu: lambda gradient, x, out: _aten.gelu_backward.grad_input(gradient, x, grad_input=out),
    functional.relu: lambda gradient, x, out: _aten.threshold_backward.grad_input(gradient, x, 0, grad_input=out),
    relu2: lambda gradient, x, out: torch.mul(gradient, 2 * functional.relu(x), out=out),
}
"""Activation -> its gradient"""


class Gated(nn.Module):
    """What the engine's MLP applies to [gate, up], [..., 2 x f] -> [..., f]."""

    def __init__(self, config: Any):
        super().__init__()
        self.function = config.activation_func

    def forward(self, x: Tensor) -> Tensor:
        return _Gated.apply(x, self.function)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Answer the engine, which asks every part of an MLP for its weights: there are none."""
        return {}


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function = function
        gate, up = x.chunk(2, -1)
        return function(gate) * up

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        (gate, up), found = x.chunk(2, -1), torch.empty_like(x)
        of_gate, of_up = found.chunk(2, -1)
        torch.mul(gradient, ctx.function(gate), out=of_up)
        GRADIENTS[ctx.function](gradient * up, gate, of_gate)
        return found, None

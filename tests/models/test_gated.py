"""The gated activation: the numbers of torch's own operations, bit for bit, and nothing but the input kept."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from megatron_ft.models.gated import GRADIENTS, Gated, _Gated


@pytest.mark.parametrize("function", GRADIENTS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_plain_operations(function, dtype):
    x, weight = (
        torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype) for shape in ((5, 3, 64), (5, 3, 32))
    )
    results = []
    for gated in (lambda x: _Gated.apply(x, function), lambda x: function(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]):
        own = x.clone().requires_grad_()
        output = gated(own)
        (output * weight).sum().backward()
        results.append((output.detach(), own.grad))
    (output, gradient), (plain, plain_gradient) = results
    assert torch.equal(output, plain) and torch.equal(gradient, plain_gradient) and gradient.abs().sum() > 0


def test_keeps_its_input_only():
    kept = []
    x = torch.randn(4, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        _Gated.apply(x, functional.silu)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]


def test_answers_every_engine_that_asks_for_its_weights():
    """megatron-core 0.16 asks with values in their order, 0.19 by their names."""
    gated = Gated(SimpleNamespace(activation_func=functional.silu))
    assert gated.sharded_state_dict("mlp.", (), {}) == {}
    assert gated.sharded_state_dict(prefix="mlp.", sharded_offsets=(), metadata={}) == {}

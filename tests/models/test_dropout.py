"""The compiled form of residual dropout: its hand-written gradient, what it keeps, and what its kernels are given."""

from __future__ import annotations

import pytest


@pytest.fixture
def dropout(monkeypatch):
    """The module, whose kernels are run as they are written."""
    from megatron_ft.models import dropout

    monkeypatch.setattr(dropout, "_compiled", lambda function: function)
    return dropout


@pytest.fixture
def arguments(dropout):
    """keys, channels, words, scale for 64 x 4 x 128 entries."""
    import numpy as np
    import torch

    keys = torch.from_numpy(dropout.token_keys(1, np.arange(4), 64)).transpose(1, 2).contiguous()
    return keys, dropout.channel_bits(128, keys.device), *dropout.place_of(7, 0.3, keys.device)


@pytest.mark.parametrize("residual_type", ["bfloat16", "float32"])
@pytest.mark.parametrize("type", ["bfloat16", "float32"])
def test_its_gradient_is_the_one_that_autograd_finds(type, residual_type, dropout, arguments):
    import torch

    made = torch.Generator().manual_seed(1)
    x, residual = (torch.randn(64, 4, 128, generator=made).to(getattr(torch, name)) for name in (type, residual_type))
    results = []
    for function in (dropout.FusedDroppedAdd.apply, dropout._dropped_add):
        inputs = [one.clone().requires_grad_() for one in (x, residual)]
        out = function(*inputs, *arguments)
        (out * torch.linspace(-1, 1, 128)).sum().backward()
        results.append((out.detach(), inputs[0].grad, inputs[1].grad))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_no_mask_is_kept_for_the_backward_pass(dropout, arguments):
    import torch

    kept = []
    x = torch.ones(64, 4, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        dropout.FusedDroppedAdd.apply(x, torch.zeros_like(x), *arguments)
    assert sum(kept) < x.numel() / 4, kept  # a mask has a byte for each entry


def test_the_hash_is_computed_from_tensors_of_32_bits(arguments):
    """A compiler may give Python integers 64 bits, where the arithmetic does not wrap: half of all entries were dropped so."""
    import torch

    *tensors, scale = arguments
    assert isinstance(scale, float)
    assert [(type(one), one.dtype) for one in tensors] == [(torch.Tensor, torch.int32)] * 3

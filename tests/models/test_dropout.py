"""The compiled form of residual dropout: its hand-written gradient, what it keeps, and what its kernels are given."""

from __future__ import annotations

import pytest


def in_two_ways(type: str, residual_type: str):
    """Return (output, gradient of x, gradient of the residual) of our gradient and of autograd's; kernels run as they are written."""
    from unittest import mock

    import torch

    from megatron_ft.models import dropout

    made, results = torch.Generator().manual_seed(1), []
    x, residual = (torch.randn(64, 4, 128, generator=made).to(getattr(torch, name)) for name in (type, residual_type))
    with mock.patch.object(dropout, "_compiled", lambda function: function):
        for function in (dropout.FusedDroppedAdd.apply, dropout._dropped_add):
            inputs = [one.clone().requires_grad_() for one in (x, residual)]
            out = function(*inputs, *arguments())
            (out * torch.linspace(-1, 1, 128)).sum().backward()
            results.append((out.detach(), inputs[0].grad, inputs[1].grad))
    return results


def arguments():
    """keys, channels, words, scale for 64 x 4 x 128 entries."""
    import numpy as np
    import torch

    from megatron_ft.models import dropout

    keys = torch.from_numpy(dropout.token_keys(1, np.arange(4), 64)).transpose(1, 2).contiguous()
    return keys, dropout.channel_bits(128, keys.device), *dropout.place_of(7, 0.3, keys.device)


def bytes_kept():
    from unittest import mock

    import torch

    from megatron_ft.models import dropout

    kept, x = [], torch.ones(64, 4, 128, requires_grad=True)
    with (
        mock.patch.object(dropout, "_compiled", lambda function: function),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t),
    ):
        dropout.FusedDroppedAdd.apply(x, torch.zeros_like(x), *arguments())
    return sum(kept), x.numel()


@pytest.mark.parametrize("residual_type", ["bfloat16", "float32"])
@pytest.mark.parametrize("type", ["bfloat16", "float32"])
def test_its_gradient_is_the_one_that_autograd_finds(type, residual_type, one_rank):
    import torch

    for ours, theirs in zip(*one_rank.run(in_two_ways, type, residual_type)[0], strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_no_mask_is_kept_for_the_backward_pass(one_rank):
    kept, entries = one_rank.run(bytes_kept)[0]
    assert 0 < kept < entries / 4  # a mask has a byte for each entry


def test_the_hash_is_computed_from_tensors_of_32_bits(one_rank):
    """A compiler may give Python integers 64 bits, where the arithmetic does not wrap: half of all entries were dropped so."""
    import torch

    *tensors, scale = one_rank.run(arguments)[0]
    assert isinstance(scale, float)
    assert [(type(one), one.dtype) for one in tensors] == [(torch.Tensor, torch.int32)] * 3

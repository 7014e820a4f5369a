"""Which kernels are chosen where, and that one call over all samples of a packed row is what one call a sample is."""

import pytest

from megatron_ft.config.sections import Kernels, Numerics
from megatron_ft.models.kernels import Machine, choose, varlen_attention

GPU = Machine(has_gpu=True, torch_varlen=True)
FULL = Machine(has_gpu=True, torch_varlen=True, flash_attn=True, transformer_engine=True, apex=True)
HALF = Numerics(bf16=True)
CHOICES = [
    (
        Kernels(use_flash_attn=True),
        HALF,
        Machine(flash_attn=True, torch_varlen=True),
        "by-sample",
        "torch",
        False,
        "no GPU",
    ),
    (Kernels(), HALF, GPU, "torch-varlen", "torch", True, None),
    (Kernels(use_flash_attn=True), HALF, GPU, "torch-varlen", "torch", True, "flash-attn is not installed"),
    (Kernels(use_flash_attn=True), HALF, FULL, "flash-attn", "Transformer Engine", True, None),
    (Kernels(), HALF, FULL, "torch-varlen", "Transformer Engine", True, None),
    (Kernels(use_flash_attn=True), Numerics(), FULL, "by-sample", "Transformer Engine", True, "need --bf16 or --fp16"),
    (Kernels(), Numerics(fp16=True, attention_dropout=0.1), GPU, "by-sample", "torch", True, "one by one"),
    (
        Kernels(use_flash_attn=True),
        Numerics(bf16=True, attention_dropout=0.1),
        FULL,
        "flash-attn",
        "Transf",
        True,
        None,
    ),
    (Kernels(fused_kernels=False), HALF, Machine(has_gpu=True, apex=True), "by-sample", "apex", False, None),
]


@pytest.mark.parametrize(("flags", "numerics", "here", "packed", "optimizer", "fused", "reason"), CHOICES)
def test_choices(flags, numerics, here, packed, optimizer, fused, reason):
    choice = choose(flags, numerics, here)
    assert (choice.packed_attention, choice.fused) == (packed, fused) and choice.optimizer.startswith(optimizer)
    assert (reason in choice.reasons[0]) if reason else not choice.reasons
    assert (varlen_attention(choice) is None) == (packed == "by-sample")
    assert all(what and how for what, how in choice.lines())


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("groups", [8, 2])
def test_one_call_for_all_samples_is_told_what_it_needs(window, groups, one_rank):
    """A stand-in for the kernel, written with masks: same arguments as flash-attn and torch's take, same output as sample by sample."""
    assert one_rank.run(both_ways, window, groups)[0] < 1e-5


def test_fused_activation_and_loss_change_nothing(one_rank):
    """The engine's compiled SwiGLU and cross entropy, on the CPU in bf16: loss and gradients as without, up to rounding."""
    assert 0 < one_rank.run(fused_or_not)[0] < 3e-2


def both_ways(window, groups):
    """Largest difference between the two outputs."""
    import torch

    from megatron_ft.models.attention import SdpaAttention
    from megatron_ft.training.step import packed_params

    torch.manual_seed(0)
    query, key, value = (torch.randn(29, heads, 16) for heads in (8, groups, groups))
    packed = packed_params([7, 1, 13, 8], torch.device("cpu"))
    outputs = []
    for varlen in (None, masked):
        attention = SdpaAttention(_config(window), 1, None, "self", varlen=varlen).eval()
        outputs.append(attention(query, key, value, packed_seq_params=packed))
    assert outputs[0].shape == (29, 8 * 16)
    return float((outputs[0] - outputs[1]).abs().max())


def _config(window):
    from types import SimpleNamespace

    size = None if window is None else (window - 1, 0)
    return SimpleNamespace(
        kv_channels=16, attention_dropout=0.0, window_size=size, window_attn_skip_freq=None, sequence_parallel=False
    )


def masked(query, key, value, boundaries, longest, scale, window, dropout):
    """What a variable-length kernel computes, with a mask over the whole row."""
    import torch

    assert boundaries.dtype == torch.int32 and longest == 13 and not dropout
    sample = torch.searchsorted(boundaries, torch.arange(len(query)), right=True)
    distance = torch.arange(len(query))[:, None] - torch.arange(len(query))
    mask = (sample[:, None] == sample) & (distance >= 0) & (distance < (window or len(query)))
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def fused_or_not():
    """Largest difference of loss and gradients, relative."""
    import dataclasses

    from megatron_ft.models import kernels
    from megatron_ft.training import invariance, setup
    from tests.parallel.test_invariance import LLAMA

    found, original = [], kernels.choose
    try:
        for fused in (False, True):
            setup.choose = lambda *given, fused=fused: dataclasses.replace(original(*given), fused=fused)
            problem = invariance.Problem(LLAMA, numerics=Numerics(bf16=True))
            found.append(invariance.measure(problem, invariance.Case("one", 1)))
    finally:
        setup.choose = original
    return invariance.compare(*found).largest

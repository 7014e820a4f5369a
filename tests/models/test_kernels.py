"""Which kernels are chosen where, and that one call over all samples of a packed row is what one call a sample is."""

from dataclasses import replace

import pytest

from megatron_ft.config.sections import Kernels, Numerics
from megatron_ft.models.kernels import Attention, Machine, choose, varlen_attention

V210 = frozenset("query key value cu_seq_q cu_seq_k max_q max_k is_causal return_aux".split())
V211 = V210 - {"is_causal"} | {"scale", "window_size"}
V212 = V211 | {"enable_gqa", "seqused_k", "block_table", "num_splits"}
"""Arguments of torch.nn.attention.varlen.varlen_attn in torch 2.10, 2.11 and 2.12 (docs.pytorch.org)."""
GPU = Machine(has_gpu=True, varlen=V212, compiles=True)
OLD = Machine(has_gpu=True, varlen=V212, compiles=True, flash_attn=True, capability=(7, 5))
FULL = Machine(
    has_gpu=True, varlen=V212, compiles=True, flash_attn=True, transformer_engine=True, apex=True, accumulates=True
)  # fmt: skip
BROKEN = replace(GPU, lacks={"flash_attn": "installed but cannot be imported (undefined symbol)"})
UNCOMPILED = Machine(has_gpu=True, varlen=V212, lacks={"compiles": "Python.h is missing"})
HALF, FLASH = Numerics(bf16=True), Kernels(use_flash_attn=True)
DROPS = Numerics(fp16=True, attention_dropout=0.1)
CHOICES = [
    (FLASH, HALF, Machine(flash_attn=True, varlen=V212), "by-sample", "torch", False, "no GPU"),
    (Kernels(), HALF, GPU, "torch-varlen", "torch", True, None),
    (FLASH, HALF, GPU, "torch-varlen", "torch", True, "flash-attn is not installed"),
    (FLASH, HALF, BROKEN, "torch-varlen", "torch", True, "cannot be imported (undefined symbol)"),
    (FLASH, HALF, FULL, "flash-attn", "Transformer Engine", True, None),
    (Kernels(), HALF, FULL, "torch-varlen", "Transformer Engine", True, None),
    (FLASH, Numerics(), FULL, "by-sample", "Transformer Engine", True, "need --bf16 or --fp16"),
    (Kernels(), DROPS, GPU, "by-sample", "torch", True, "one by one"),
    (FLASH, replace(DROPS, fp16=False, bf16=True), FULL, "flash-attn", "Transf", True, None),
    (Kernels(fused_kernels=False), HALF, replace(GPU, apex=True), "torch-varlen", "apex", False, None),
    (Kernels(), HALF, replace(GPU, varlen=V210), "by-sample", "torch", True, "no enable_gqa"),
    (Kernels(), HALF, replace(GPU, varlen=V211), "by-sample", "torch", True, "no enable_gqa"),
    (
        Kernels(),
        HALF,
        replace(GPU, varlen=frozenset()),
        "by-sample",
        "torch",
        True,
        "this torch has no variable-length",
    ),
    (Kernels(), Numerics(fp16=True), OLD, "by-sample", "torch", True, "need compute capability 8.0, this GPU has 7.5"),
    (Kernels(), HALF, UNCOMPILED, "torch-varlen", "torch", False, "Python.h is missing"),
]


@pytest.mark.parametrize(("flags", "numerics", "here", "packed", "optimizer", "fused", "reason"), CHOICES)
def test_choices(flags, numerics, here, packed, optimizer, fused, reason):
    choice = choose(flags, numerics, here)
    assert (choice.packed_attention, choice.fused) == (packed, fused) and choice.optimizer.startswith(optimizer)
    assert (reason in choice.reasons[0]) if reason else not choice.reasons
    assert (varlen_attention(choice) is None) == (packed == "by-sample")
    assert all(what and how for what, how in choice.lines())


@pytest.mark.parametrize(
    ("varlen", "attention", "packed"),
    [
        (V210, Attention(grouped=False), "torch-varlen"),
        (V210, Attention(grouped=False, scaled=True), "by-sample"),
        (V210, Attention(grouped=False, window=True), "by-sample"),
        (V211, Attention(grouped=False, window=True, scaled=True), "torch-varlen"),
        (V211, Attention(grouped=True), "by-sample"),
        (V212, Attention(grouped=True, window=True, scaled=True), "torch-varlen"),
    ],
)
def test_what_the_installed_torch_cannot_do_is_attended_by_sample(varlen, attention, packed):
    assert choose(Kernels(), HALF, replace(GPU, varlen=varlen), attention).packed_attention == packed


def test_grouped_heads_are_repeated_where_no_kernel_without_a_full_matrix_knows_them():
    """torch's flash kernel has grouped heads but no masks and no fp32; its memory-efficient one has both, but no groups."""
    fp32, half, old = choose(Kernels(), Numerics(), GPU), choose(Kernels(), HALF, GPU), choose(Kernels(), HALF, OLD)
    assert fp32.repeats(masked=False) and fp32.repeats(masked=True)
    assert not half.repeats(masked=False) and half.repeats(masked=True)
    assert old.repeats(masked=False)
    assert not choose(Kernels(), Numerics(), Machine()).repeats(masked=True)


def test_weight_gradients_are_added_within_the_product_where_the_extension_is():
    assert choose(Kernels(), HALF, FULL).accumulates and not choose(Kernels(), HALF, GPU).accumulates
    assert not choose(Kernels(gradient_accumulation_fusion=False), HALF, FULL).accumulates


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
    from megatron_ft.models.rows import packed_on

    torch.manual_seed(0)
    query, key, value = (torch.randn(29, 1, heads, 16) for heads in (8, groups, groups))
    packed = packed_on([7, 1, 13, 8], torch.device("cpu"))
    outputs = []
    for varlen in (None, masked):
        attention = SdpaAttention(_config(window), 1, None, "self").eval()
        attention.varlen = varlen
        outputs.append(attention(query, key, value, packed_seq_params=packed))
    assert outputs[0].shape == (29, 1, 8 * 16)
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

"""Checks of some steps in bf16 over packed rows: the loss falls, and compiled kernels agree with torch's operations."""

from __future__ import annotations

from pathlib import Path

from megatron_ft import device
from megatron_ft.config.sections import Kernels, Numerics
from megatron_ft.doctor.judge import STEPS, Course, judge_masks, judge_steps
from megatron_ft.doctor.result import Found, skipped
from megatron_ft.doctor.small_model import LLAMA, training


def plain_steps(folder: Path) -> Found:
    return _fused_against_plain(Numerics(bf16=True))


def masks(folder: Path) -> Found:
    """Compare the entries that compiled dropout drops, forward and backward, with the same hash computed on the CPU."""
    if not device.has_gpu():
        return skipped("nothing is compiled on a CPU")
    return judge_masks({rate: compare_masks(rate) for rate in (0.1, 0.3)})


def compare_masks(rate: float) -> tuple[float, int, int]:
    """Return (share of entries keep_mask, entries that differ from the CPU's mask: forward, backward) of 512 x 4 x 2048."""
    import numpy as np
    import torch

    from megatron_ft.models.dropout import FusedDroppedAdd, channel_bits, keep_mask, place_of, token_keys

    here, number = device.current_device(), 5
    keys = torch.from_numpy(token_keys(1, np.arange(4), 512)).transpose(1, 2).contiguous()
    expected = keep_mask(keys, 2048, number, rate)
    x = torch.ones(expected.shape, dtype=torch.bfloat16, device=here, requires_grad=True)
    place = place_of(number, rate, here)
    joined = FusedDroppedAdd.apply(x, torch.zeros_like(x), keys.to(here), channel_bits(2048, here), *place)
    joined.sum().backward()
    assert x.grad is not None
    stays, passes = joined.detach().cpu() != 0, x.grad.cpu() != 0
    return float(stays.float().mean()), int((stays != expected).sum()), int((passes != expected).sum())


def lima_steps(folder: Path) -> Found:
    """Check steps with LIMA dropout. Its masks are a function of the token, so both paths drop the same entries."""
    return _fused_against_plain(Numerics(bf16=True, hidden_dropout=0.3, lima_dropout=True))


def _fused_against_plain(numerics: Numerics) -> Found:
    used = course(numerics, Kernels(use_flash_attn=True))
    plain = course(numerics, Kernels(use_flash_attn=True, fused_kernels=False)) if device.has_gpu() else None
    return judge_steps(used, plain)


def course(numerics: Numerics, kernels: Kernels) -> Course:
    with training(LLAMA, numerics, kernels) as step:
        done = [step(0) for _ in range(STEPS)]
    return Course(tuple(one.loss for one in done), tuple(one.grad_norm for one in done))

"""Some steps in bf16 over packed rows: do they train, and do compiled kernels compute what torch's operations compute?"""

from __future__ import annotations

from pathlib import Path

from megatron_ft import device
from megatron_ft.config.sections import Kernels, Numerics
from megatron_ft.doctor.judge import STEPS, Course, judge_steps
from megatron_ft.doctor.result import Found
from megatron_ft.doctor.small_model import LLAMA, training


def plain_steps(folder: Path) -> Found:
    return _fused_against_plain(Numerics(bf16=True))


def lima_steps(folder: Path) -> Found:
    """Dropout that rises over the layers; its masks are a function of the token, so both paths drop the same entries."""
    return _fused_against_plain(Numerics(bf16=True, hidden_dropout=0.3, lima_dropout=True))


def _fused_against_plain(numerics: Numerics) -> Found:
    used = course(numerics, Kernels(use_flash_attn=True))
    plain = course(numerics, Kernels(use_flash_attn=True, fused_kernels=False)) if device.has_gpu() else None
    return judge_steps(used, plain)


def course(numerics: Numerics, kernels: Kernels) -> Course:
    with training(LLAMA, numerics, kernels) as step:
        done = [step(0) for _ in range(STEPS)]
    return Course(tuple(one.loss for one in done), tuple(one.grad_norm for one in done))

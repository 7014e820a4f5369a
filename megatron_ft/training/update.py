"""One optimizer step with ready gradients: unscale, compute the norm, clip, step; or change nothing, on all ranks alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_ft import device


@dataclass(frozen=True)
class Update:
    """The outcome of a step."""

    updated: bool
    grad_norm: float
    """Before clipping; NaN if gradients overflowed fp16."""
    loss_scale: float = 1.0
    """Factor by which the loss was multiplied in this step (fp16)."""
    overflow: bool = False
    """Not updated because gradients overflowed fp16 while a dynamic scale can still fall, until it fits."""


def update(optimizer: Any) -> Update:
    """Clip gradients and step, as the engine's ChainedOptimizer.step, unless the gradient norm is not finite: then nothing changes.

    All ranks decide the same, also if only one replica has a number that is not finite.
    """
    scaler = getattr(optimizer.chained_optimizers[0], "grad_scaler", None)
    scale = float(scaler.scale) if scaler else 1.0
    can_fall = _can_fall(scaler)
    overflow = optimizer.prepare_grads()
    norm = math.nan if overflow else float(optimizer.get_grad_norm())
    if _any_rank(not math.isfinite(norm)):
        return Update(False, norm, scale, overflow=overflow and can_fall)
    for part in optimizer.chained_optimizers:
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=norm)
    return Update(bool(optimizer.step_with_ready_grads()), norm, scale)


def _any_rank(mine: bool) -> bool:
    """Return whether it is so on any rank: the engine's norm is the same within a replica of the model, not over all of them."""
    # Filled on the device: nothing is copied, the host does not wait.
    found = torch.full([1], int(mine), device=device.current_device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found.item())


def _can_fall(scaler: Any) -> bool:
    """Return whether the loss scale is dynamic and above its floor."""
    floor = getattr(scaler, "min_scale", None)
    return floor is not None and float(scaler.scale) > float(floor)

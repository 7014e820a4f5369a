"""NF4 (Dettmers et al. 2023, QLoRA): a weight [out, in] as 4-bit codes and one scale (absmax) for each 64 neighbours in a row.

Codes [out, in/2] have two weights in a byte, the first one in the high half, as bitsandbytes stores them. Because a block never leaves its
row, slices by rows and by whole blocks of columns are those of the whole matrix. Codes, scales and dequantised weights equal those of
bitsandbytes bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megatron_ft.errors import CheckpointError
from megatron_ft.quantization.sizes import BLOCK

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The value of each code, as a share of the scale: quantiles of a normal distribution (QLoRA, appendix E)."""
_AT_ONCE = 1 << 22  # weights that are quantised at once, which bounds temporary memory


Dequantise = Callable[[Tensor, Tensor, torch.dtype], Tensor]
"""f(codes, absmax, dtype) -> weight"""


class Nf4(NamedTuple):
    """A quantised matrix."""

    codes: Tensor
    """uint8 [out, in/2]"""
    absmax: Tensor
    """fp32 [out, in/64]"""


def quantise(weight: Tensor, name: str = "a weight") -> Nf4:
    """Quantise a matrix [out, in]. Raise CheckpointError, with its name, where blocks do not fit or a number is not finite."""
    if weight.dim() != 2 or weight.shape[1] % BLOCK:
        raise CheckpointError(f"{name} is {list(weight.shape)}: NF4 needs rows of a multiple of {BLOCK} numbers")
    rows = max(1, _AT_ONCE // max(1, weight.shape[1]))
    parts = [_quantise(part) for part in weight.detach().split(rows)]
    found = Nf4(torch.cat([part.codes for part in parts]), torch.cat([part.absmax for part in parts]))
    if not bool(found.absmax.isfinite().all()):
        raise CheckpointError(
            f"{name} holds numbers that are not finite, which NF4 cannot express: use another checkpoint"
        )
    return found


def dequantise(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [out, in] in a floating-point type: level x scale in fp32, rounded once."""
    levels = functional.embedding(codes.int(), _pairs(codes.device)).reshape(*absmax.shape, BLOCK)
    return levels.mul_(absmax[..., None]).to(dtype).reshape(codes.shape[0], -1)


def _quantise(weight: Tensor) -> Nf4:
    blocks = weight.float().reshape(weight.shape[0], -1, BLOCK)
    absmax = blocks.abs().amax(-1)
    inverse = (1 / absmax).nan_to_num(0.0, 0.0, 0.0)  # a block of zeros
    codes = torch.bucketize(blocks * inverse[..., None], _between(weight.device), out_int32=True).to(torch.uint8)
    codes = codes.reshape(weight.shape)
    return Nf4((codes[:, 0::2] << 4) | codes[:, 1::2], absmax)


@functools.cache
def _between(device: torch.device) -> Tensor:
    """Return the 15 values that separate the codes."""
    levels = torch.tensor(LEVELS)
    return ((levels[1:] + levels[:-1]) / 2).to(device)


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """Return the two levels of each byte, [256, 2]: one look-up for two weights."""
    levels, byte = torch.tensor(LEVELS), torch.arange(256)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], 1).to(device)

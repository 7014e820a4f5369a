"""Double quantisation (QLoRA, section 3): the scales of NF4 in 8 bits, 4.127 instead of 4.5 bits a weight.

The mean of all scales of a matrix is subtracted; blocks of 256 of them, in row order, then share an fp32 scale of their own. A block
crosses rows and the mean is of the whole matrix, so this form is one of whole Hugging Face matrices on disk; in memory scales are fp32.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ft.quantization.sizes import NESTED_BLOCK

_SUMMED_BY_ONE = 1 << 15  # torch's grain size


class Double(NamedTuple):
    """Scales of a matrix, quantised."""

    codes: Tensor
    """uint8, the shape of the scales"""
    nested: Tensor
    """fp32 [blocks + 1]: the scale of each block, then the mean"""


def quantise(absmax: Tensor, mean: Tensor | None = None) -> Double:
    """Return the nearest codes. absmax: fp32. mean: as stored elsewhere; default: that of absmax.

    bitsandbytes' CPU kernel does not always take the nearest; its own files are read as they are.
    """
    mean = _mean(absmax) if mean is None else mean
    flat = (absmax - mean).reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    largest = blocks.abs().amax(1)
    scaled = blocks * (1 / largest).nan_to_num(0.0, 0.0, 0.0)[:, None]
    codes = torch.bucketize(scaled, _between(), out_int32=True).to(torch.uint8).reshape(-1)[: flat.numel()]
    return Double(codes.reshape(absmax.shape), torch.cat([largest, mean.reshape(1)]))


def _mean(absmax: Tensor) -> Tensor:
    """Return the mean, which does not depend on the number of threads: torch divides larger sums in fp32 among them."""
    return absmax.mean() if absmax.numel() < _SUMMED_BY_ONE else absmax.double().mean().float()


def dequantise(codes: Tensor, scale: Tensor, mean: Tensor) -> Tensor:
    """Return fp32 scales of any slice. scale, mean: of each code (see `spread`), or what broadcasts to that."""
    return levels()[codes.int()] * scale + mean


def spread(nested: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return (scale, mean) of every code of a whole matrix of codes, [rows, columns] each."""
    count = shape[0] * shape[1]
    scale = nested[:-1].repeat_interleave(NESTED_BLOCK)[:count].reshape(shape)
    return scale, nested[-1].expand(shape)


@functools.cache
def levels() -> Tensor:
    """Return the values of the 256 codes, ascending (Dettmers 2016, "8-Bit Approximations for Parallelism in Deep Learning").

    Decades from 1e-6 to 1, the larger the decade the more values in it; each is the middle of equal steps from a tenth to the whole.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        steps = torch.linspace(0.1, 1, 2**decade + 1)
        middles = (10.0 ** (decade - 6)) * ((steps[:-1] + steps[1:]) / 2)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values))


@functools.cache
def _between() -> Tensor:
    return (levels()[1:] + levels()[:-1]) / 2

"""The sums of kernel.c in plain torch, in the same order, so with the same bits. Slower: it reads a matrix in several passes."""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 64
"""Numbers of a row that are summed side by side; the columns of a matrix are a multiple."""
_AT_ONCE = 1 << 22


def row_products(data: Tensor, scales: Tensor | None, x: Tensor, chosen: Tensor | None, out: Tensor) -> None:
    """Set out[row] = data[row] . x for the chosen rows, None: for all."""
    rows = torch.arange(len(data)) if chosen is None else chosen.long()
    for some in rows.split(max(1, _AT_ONCE // data.shape[1])):
        totals = _totals((data[some].float() * x).view(len(some), len(x) // LANES, LANES))
        out[some] = totals if scales is None else totals * scales[some]


def _totals(parts: Tensor) -> Tensor:
    """Sum [rows, steps, 64]: each lane over the steps, then the lanes by halves."""
    lanes = torch.zeros(parts.shape[0], LANES)
    for step in range(parts.shape[1]):
        lanes = lanes + parts[:, step]
    a, b, c, d = lanes.view(-1, 4, 16).unbind(1)
    left = (a + c) + (b + d)
    while left.shape[1] > 1:
        first, second = left.chunk(2, dim=1)
        left = first + second
    return left[:, 0]


def row_sums(data: Tensor, scales: Tensor | None, weights: Tensor, chosen: Tensor | None, out: Tensor) -> None:
    """Set out to the sum of weights[row] * data[row] over the chosen rows, in their order."""
    rows = torch.arange(len(data)) if chosen is None else chosen.long()
    factors = weights if scales is None else weights * scales
    out.zero_()
    for some in rows.split(max(1, _AT_ONCE // data.shape[1])):
        for row in data[some].float() * factors[some][:, None]:
            out += row

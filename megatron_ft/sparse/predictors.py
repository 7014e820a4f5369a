"""Predictors: which activations of an MLP will not be zero, from its input, by two thin matrices of a layer (Liu 2023, "Deja Vu").

A row is likely where high (low x) + bias > 0. The row's activation is then computed as ever; what is not likely counts as zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ft.sparse.rows import Precision, Rows


@dataclass(frozen=True)
class Thin:
    """The matrices of a layer in fp32, as they are trained and stored."""

    low: Tensor
    """[rank, hidden]"""
    high: Tensor
    """[ffn, rank]"""
    bias: Tensor
    """[ffn], with what was found to give the recall that is wanted"""

    def scores(self, x: Tensor) -> Tensor:
        """Return [n, ffn] of x [n, hidden]."""
        return torch.addmm(self.bias, x @ self.low.t(), self.high.t())


class Predictor:
    """A layer's, ready to be used."""

    def __init__(self, thin: Thin, precision: Precision):
        self.low, self.high = Rows.of(thin.low, precision), Rows.of(thin.high, precision)
        self.bias = thin.bias.float()

    def rows(self, x: Tensor) -> Tensor:
        """Return the likely rows, int32 and rising, for x [hidden]."""
        scores = self.high.products(self.low.products(x)) + self.bias
        return (scores > 0).nonzero()[:, 0].int()

    def likely(self, x: Tensor) -> Tensor:
        """Return 1 for likely rows, 0 for others, [n, ffn] for x [n, hidden]."""
        return (self.high.many(self.low.many(x)) + self.bias > 0).float()

    @property
    def bytes(self) -> int:
        return sum(one.rows * one.row_bytes for one in (self.low, self.high)) + self.bias.nbytes

"""The layers of a model that decodes with `Rows`: the MLP, which leaves rows out, and the other linears, which read all of theirs.

One token at a time goes through the kernel. Several tokens, as in a prompt, are multiplied by torch, which reads the weights once for all
of them. An activation that is zero contributes nothing, so leaving its rows out is exact: the result has the bits of the dense one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megatron_ft.models.gated import relu2
from megatron_ft.sparse.predictors import Predictor
from megatron_ft.sparse.rows import Rows

Mode = Literal["dense", "exact", "predicted"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu, "reglu": torch.relu, "relu2": relu2, "relu2glu": relu2,
}  # fmt: skip
"""Architecture.activation -> function, of those that are zero for half of all numbers."""


@dataclass
class How:
    """The mode of all layers of a model."""

    mode: Mode = "exact"


@dataclass
class Counts:
    """Activations of single tokens that went through a layer."""

    tokens: int = 0
    active: int = 0
    """those that were not zero"""
    computed: int = 0
    """those whose row of the first matrix was read"""


class RowsLinear(nn.Module):
    """A linear in the place of the engine's, which it resembles: it returns (output, None)."""

    weight: Any = None  # what reads a linear's weight directly does not work with this one

    def __init__(self, matrix: Rows, bias: Tensor | None = None):
        super().__init__()
        self.matrix, self.bias = matrix, bias

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        flat = x.reshape(-1, x.shape[-1]).float()
        out = self.matrix.products(flat[0])[None] if len(flat) == 1 else self.matrix.many(flat)
        out = out if self.bias is None else out + self.bias
        return out.view(*x.shape[:-1], -1), None


class SparseMlp(nn.Module):
    """down(act(first x)), or down(act(first x) * up x): `first` is the matrix that decides what is zero.

    first, up: [ffn, hidden]. down: [ffn, hidden] too, the transposed of the engine's, so that what is left out is a row.
    """

    def __init__(self, first: Rows, up: Rows | None, down: Rows, activation: str, how: How):
        super().__init__()
        self.first, self.up, self.down, self.how = first, up, down, how
        self.act = ACTIVATIONS[activation]
        self.predictor: Predictor | None = None
        self.counts = Counts()

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        flat = x.reshape(-1, x.shape[-1]).float()
        out = self._one(flat[0])[None] if len(flat) == 1 else self._many(flat)
        return out.view(x.shape), None

    def _one(self, x: Tensor) -> Tensor:
        likely = self._predictor.rows(x) if self.how.mode == "predicted" else None
        activations = self.act(self.first.products(x, likely))
        active = activations.nonzero()[:, 0].int()
        self.counts.tokens += 1
        self.counts.active += len(active)
        self.counts.computed += self.first.rows if likely is None else len(likely)
        left = None if self.how.mode == "dense" else active
        if self.up is not None:
            activations = activations * self.up.products(x, left)
        return self.down.sums(activations, left)

    def _many(self, x: Tensor) -> Tensor:
        activations = self.act(self.first.many(x))
        if self.how.mode == "predicted":
            activations = activations * self._predictor.likely(x)
        if self.up is not None:
            activations = activations * self.up.many(x)
        return self.down.many_sums(activations)

    @property
    def _predictor(self) -> Predictor:
        assert self.predictor is not None, "the mode needs predictors"
        return self.predictor

    @property
    def dense_bytes(self) -> int:
        """Return the bytes of all its matrices."""
        return sum(one.rows * one.row_bytes for one in (self.first, self.up, self.down) if one is not None)

    def read_bytes(self, mode: Mode) -> float:
        """Return the bytes that a token read in a mode, with the activations counted so far."""
        if mode == "dense":
            return self.dense_bytes
        tokens = max(1, self.counts.tokens)
        read = self.counts.computed / tokens * self.first.row_bytes
        for one in (self.up, self.down):
            read += self.counts.active / tokens * one.row_bytes if one is not None else 0
        return read + (self._predictor.bytes if mode == "predicted" else 0)

"""A matrix that is read by rows, in fp32, bf16 or int8, and its products with one vector or with many."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_ft.log import logger
from megatron_ft.sparse import reference
from megatron_ft.sparse.build import library

log = logger("sparse")

Precision = Literal["fp32", "bf16", "int8"]
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # as kernel.c counts them
_LARGE = 1 << 22
"""Bytes from which memory is in large pages (kernel.c has the same number): a thread reads them a fifth faster."""
_AT_ONCE = 1 << 20
"""Numbers that are converted to fp32 at once, for a product with many vectors: few enough to stay in a cache."""


@dataclass(frozen=True)
class Rows:
    """A matrix [rows, columns]. One vector is multiplied by the kernel, or by torch with the same bits; all results are fp32."""

    data: Tensor
    """[rows, columns, padded with zeros to a multiple of 64]"""
    scales: Tensor | None
    """of int8: what a row is multiplied by"""
    columns: int

    @classmethod
    def of(cls, weight: Tensor, precision: Precision) -> Rows:
        """Return a matrix in a precision, in large pages; a small one that has not to change shares the weight's memory."""
        rows, columns = weight.shape
        scales = None
        if precision == "int8":
            scales = (weight.detach().abs().amax(1).float() / 127).clamp(min=torch.finfo(torch.float32).tiny)
        wide = -columns % reference.LANES
        if not wide and weight.dtype == TYPES[precision] and weight.is_contiguous() and weight.nbytes < _LARGE:
            return cls(weight.detach(), None, columns)
        data = empty(rows, columns + wide, TYPES[precision])
        for some in torch.arange(rows).split(max(1, _AT_ONCE // (columns + wide))):
            part = slice(int(some[0]), int(some[-1]) + 1)
            values = weight.detach()[part]
            data[part] = pad(values if scales is None else (values.float() / scales[part, None]).round(), (0, wide))
        return cls(data, scales, columns)

    @property
    def rows(self) -> int:
        return len(self.data)

    @property
    def row_bytes(self) -> int:
        return self.data.shape[1] * self.data.element_size() + (4 if self.scales is not None else 0)

    def products(self, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Return the product of each chosen row with x [columns]: [rows], 0 where a row is not chosen. chosen: int32, rising."""
        out = torch.empty(self.rows) if chosen is None else torch.zeros(self.rows)
        x = pad(x.float(), (0, self.data.shape[1] - self.columns)).contiguous()
        if (native := kernel()) is None:
            reference.row_products(self.data, self.scales, x, chosen, out)
        else:
            native.row_products(*self._arguments(x, chosen, out))
        return out

    def sums(self, weights: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Return the sum of the chosen rows, each times its weight: [columns]. weights [rows] fp32."""
        out = torch.empty(self.data.shape[1])
        if (native := kernel()) is None:
            reference.row_sums(self.data, self.scales, weights, chosen, out)
        else:
            native.row_sums(*self._arguments(weights.contiguous(), chosen, out))
        return out[: self.columns]

    def _arguments(self, x: Tensor, chosen: Tensor | None, out: Tensor) -> tuple:
        scales = None if self.scales is None else self.scales.data_ptr()
        which = None if chosen is None else chosen.data_ptr()
        count = ctypes.c_int64(self.rows if chosen is None else len(chosen))
        columns = ctypes.c_int64(self.data.shape[1])
        places = (ctypes.c_void_p(place) for place in (self.data.data_ptr(), scales, x.data_ptr(), which))
        return _KINDS[self.data.dtype], *places, count, columns, ctypes.c_void_p(out.data_ptr()), threads()

    def many(self, x: Tensor) -> Tensor:
        """Return x [n, columns] times the transposed matrix: [n, rows]."""
        return torch.cat([x @ part.t() for part in self._plain()], dim=1)

    def many_sums(self, weights: Tensor) -> Tensor:
        """Return weights [n, rows] times the matrix: [n, columns]."""
        out = weights.new_zeros(len(weights), self.columns)
        at = 0
        for part in self._plain():
            out += weights[:, at : at + len(part)] @ part
            at += len(part)
        return out

    def _plain(self) -> Iterator[Tensor]:
        """Yield the matrix in pieces of some rows, in fp32."""
        each = max(1, _AT_ONCE // self.data.shape[1])
        for at in range(0, self.rows, each):
            part = self.data[at : at + each, : self.columns].float()
            yield part if self.scales is None else part * self.scales[at : at + each, None]


def empty(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return memory for a matrix, in large pages where the system has them."""
    made = torch.empty(rows, columns, dtype=dtype)
    if (native := kernel()) is not None:
        native.large_pages(ctypes.c_void_p(made.data_ptr()), ctypes.c_int64(made.nbytes))
    return made


def threads() -> int:
    """Return the number of threads of the kernel: torch's."""
    return torch.get_num_threads()


@functools.cache
def kernel() -> ctypes.PyDLL | None:
    """Return the compiled kernel if it computes the bits of reference.py here, else None."""
    native = library()
    if native is not None and not _agrees(native):
        log.warning("sparse decoding computes with torch, which is slower: the compiled kernel rounds differently here")
        return None
    return native


def _agrees(native: ctypes.PyDLL) -> bool:
    """Compare every precision, with and without chosen rows."""
    made = torch.Generator().manual_seed(0)
    x, weights = torch.randn(192, generator=made), torch.randn(13, generator=made)
    for precision, dtype in TYPES.items():
        values = torch.randn(13, 192, generator=made) * 50
        one = Rows(values.to(dtype), weights.abs() if precision == "int8" else None, 192)
        for chosen in (None, torch.tensor([0, 2, 3, 7, 8, 12], dtype=torch.int32)):
            pairs = [(torch.zeros(13), torch.zeros(13)), (torch.zeros(192), torch.zeros(192))]
            native.row_products(*one._arguments(x, chosen, pairs[0][0]))
            reference.row_products(one.data, one.scales, x, chosen, pairs[0][1])
            native.row_sums(*one._arguments(weights, chosen, pairs[1][0]))
            reference.row_sums(one.data, one.scales, weights, chosen, pairs[1][1])
            if not all(torch.equal(*pair) for pair in pairs):
                return False
    return True


def read_speed(numbers: Tensor) -> None:
    """Read fp32 numbers, a multiple of 64, once with all threads: the speed of memory, measured by the caller."""
    out = torch.empty(-(-numbers.numel() // 65536))
    if (native := kernel()) is None:
        numbers.sum()
        return
    count = ctypes.c_int64(numbers.numel())
    native.read_all(ctypes.c_void_p(numbers.data_ptr()), count, ctypes.c_void_p(out.data_ptr()), threads())

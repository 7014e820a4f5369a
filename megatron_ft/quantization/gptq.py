"""GPTQ: a matrix is rounded column by column, and the error of each column is made good by those that are not rounded yet.

Frantar et al. 2022. The Hessian of the error of the outputs, 2 X'X of the inputs X, says how. Pure functions; files are in `packed`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.01
"""Share of the Hessian's mean diagonal that is added to it."""
_BLOCK = 128
"""Columns whose errors reach the columns to their right in one product."""


@dataclass(frozen=True)
class Grid:
    """The numbers that weights are rounded to."""

    bits: int = 4
    group_size: int = 32
    """Columns of a row that share scale and zero point."""
    symmetric: bool = False
    """The zero point is the middle of the codes."""
    desc_act: bool = False
    """Columns with the largest inputs are rounded first."""
    static_groups: bool = False
    """Groups are neighbours, also with desc_act; else they are columns that are rounded one after the other."""
    scale_dtype: torch.dtype = torch.float16

    @property
    def groups_follow(self) -> bool:
        """Return whether groups are in the order of rounding, which a reader has to know."""
        return self.desc_act and not self.static_groups

    @property
    def largest(self) -> int:
        return 2**self.bits - 1


@dataclass(frozen=True)
class Codes:
    """A quantised matrix [out, in]: weight = scale x (code - zero)."""

    codes: Tensor
    """int32 [out, in], from 0"""
    scales: Tensor
    """[out, groups]"""
    zeros: Tensor
    """int32 [out, groups]"""
    groups: Tensor
    """int32 [in]: the group of each column"""

    def dense(self) -> Tensor:
        """Return the weights, computed in fp32."""
        group = self.groups.long()
        return self.scales.float()[:, group] * (self.codes - self.zeros[:, group])


def scales_of(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return scale and zero point for each row of [out, columns]; both are what a file can hold.

    A zero point is at least 1, because the GPTQ format stores it less 1.
    """
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    if grid.symmetric:
        scale = torch.maximum(-low, high) * 2 / grid.largest
        return _stored(scale, grid), torch.full_like(scale, 2 ** (grid.bits - 1)).int()
    scale = torch.maximum((high - low) / grid.largest, high / (grid.largest - 1))
    scale = _stored(scale, grid)
    return scale, torch.round(-low / scale.to(low.dtype)).clamp(1, grid.largest).int()


def _stored(scale: Tensor, grid: Grid) -> Tensor:
    """Return the scale in its type; 1 for a row of zeros, and no scale rounds to 0."""
    tiny = torch.finfo(grid.scale_dtype).tiny
    return torch.where(scale == 0, torch.ones_like(scale), scale.clamp(min=tiny)).to(grid.scale_dtype)


def nearest(weight: Tensor, grid: Grid) -> Codes:
    """Round each weight to the nearest number."""
    return quantise(weight, torch.eye(weight.shape[1]), grid)


def quantise(weight: Tensor, hessian: Tensor, grid: Grid) -> Codes:
    """Return the codes of a matrix [out, in]. hessian: [in, in], of all inputs."""
    left, hessian = weight.double().clone(), hessian.double()
    dead = hessian.diagonal() == 0
    left[:, dead] = 0
    order = _order(hessian, grid)
    spread = _inverse_root(hessian[order][:, order])
    fixed = _static(left, grid) if grid.static_groups else None
    codes, scales, zeros = _round(left[:, order], spread, grid, order, fixed)
    back = torch.argsort(order)
    number = torch.arange(weight.shape[1]) // grid.group_size
    groups = number if grid.static_groups else number[back]
    return Codes(codes[:, back].int(), scales, zeros, groups.int())


def _order(hessian: Tensor, grid: Grid) -> Tensor:
    if grid.desc_act:
        return torch.argsort(hessian.diagonal(), descending=True, stable=True)
    return torch.arange(len(hessian))


def _inverse_root(hessian: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped Hessian."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)


def _static(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    pairs = [scales_of(part, grid) for part in weight.split(grid.group_size, dim=1)]
    return torch.stack([scale for scale, _ in pairs], 1), torch.stack([zero for _, zero in pairs], 1)


def _round(
    left: Tensor, spread: Tensor, grid: Grid, order: Tensor, fixed: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and zero points. left: the weights in the order of rounding, which changes. fixed: static scales and zeros."""
    codes = torch.zeros_like(left)
    scales: list[Tensor] = []
    zeros: list[Tensor] = []
    width = _BLOCK - _BLOCK % grid.group_size or grid.group_size
    for start in range(0, left.shape[1], width):
        end = min(start + width, left.shape[1])
        errors = torch.zeros_like(left[:, start:end])
        for column in range(start, end):
            if fixed is None and column % grid.group_size == 0:
                scale, zero = scales_of(left[:, column : column + grid.group_size], grid)
                scales.append(scale)
                zeros.append(zero)
            elif fixed is not None:
                group = order[column] // grid.group_size
                scale, zero = fixed[0][:, group], fixed[1][:, group]
            step = scale.double()
            codes[:, column] = (torch.round(left[:, column] / step) + zero).clamp(0, grid.largest)
            error = (left[:, column] - step * (codes[:, column] - zero)) / spread[column, column]
            left[:, column:end] -= torch.outer(error, spread[column, column:end])
            errors[:, column - start] = error
        left[:, end:] -= errors @ spread[start:end, end:]
    return (codes, *fixed) if fixed else (codes, torch.stack(scales, 1), torch.stack(zeros, 1))


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """Return the norm of the outputs' change over that of the outputs, for the inputs of the Hessian."""
    hessian, weight = hessian.double(), weight.double()
    change = weight - rounded.double()
    energy = ((weight @ hessian) * weight).sum().item()
    return (max(0.0, ((change @ hessian) * change).sum().item()) / energy) ** 0.5 if energy else 0.0

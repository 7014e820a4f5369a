"""A hash of weights that does not depend on how they are divided over ranks, formats or files.

Each number's bits are multiplied by an odd number for its row and one for its column, and added up modulo 2^64. So every rank adds up its
own part of a tensor, and any single change changes the sum. It detects mistakes and damage, not intent.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_WORDS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_AT_ONCE = 1 << 22
"""Numbers that are multiplied at once, to bound the memory."""


def sums(part: Tensor, first_row: int = 0, first_column: int = 0) -> dict[str, int]:
    """Return the sum of a part of a tensor, [rows, columns] or [rows], that begins at this row and column of the whole.

    By the type of the numbers, "fp32", "bf16" or "fp16"; of fp32 also as rounded to the two others, in which another run may load them.
    """
    kinds = list(_WORDS) if part.dtype == torch.float32 else [part.dtype]
    return {NAMES[kind]: _sum(part.detach(), kind, first_row, first_column) for kind in kinds}


def _sum(part: Tensor, kind: torch.dtype, first_row: int, first_column: int) -> int:
    matrix = part if part.dim() == 2 else part.reshape(-1, 1)
    columns = _odd(first_column, matrix.shape[1], matrix.device, 0x2545F4914F6CDD1D)
    rows = _odd(first_row, matrix.shape[0], matrix.device, 0x1B873593CC9E2D51)
    total = torch.zeros([], dtype=torch.int64, device=matrix.device)
    each = max(1, _AT_ONCE // max(1, matrix.shape[1]))
    for some, factors in zip(matrix.split(each), rows.split(each), strict=True):
        bits = some.to(kind).contiguous().view(_WORDS[kind]).to(torch.int64)
        total += ((bits * columns).sum(1) * factors).sum()
    return int(total)


def _odd(first: int, count: int, where: torch.device, factor: int) -> Tensor:
    """Return an odd number for each index from `first` on, [count] int64."""
    x = torch.arange(first + 1, first + count + 1, dtype=torch.int64, device=where) * factor
    x = (x ^ (x >> 29)) * 0x3F58476D1CE4E5B9
    return (x ^ (x >> 32)) | 1


def digest(tensors: Mapping[str, int]) -> str:
    """Return one hash of the sums of all tensors of a model, by name. Sums may exceed 64 bits, as those of several ranks do."""
    import xxhash

    lines = (f"{name} {total % (1 << 64):016x}\n" for name, total in sorted(tensors.items()))
    return xxhash.xxh3_128_hexdigest("".join(lines).encode())

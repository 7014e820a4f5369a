"""NF4 matrices in files that transformers saved with bitsandbytes (load_in_4bit, save_pretrained). bitsandbytes is not needed.

Beside NAME.weight, the codes as one column, are NAME.weight.absmax, the tables of levels, and the sizes as JSON in a tensor of bytes; with
double quantisation absmax is in 8 bits and NAME.weight.nested_absmax has its scales. Source: bitsandbytes/functional.py, QuantState.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ft.errors import CheckpointError
from megatron_ft.models.dtypes import HF_NAMES, torch_dtype
from megatron_ft.models.quantised import Part
from megatron_ft.quantization.sizes import BLOCK, NESTED_BLOCK, nested_size

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STATE = ".quant_state.bitsandbytes__nf4"
SIDES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE, ".quant_state.bitsandbytes__fp4")
"""What the names of the tensors beside a matrix end with."""
_MOST_BYTES = 1 << 16  # of JSON; it has a few hundred
_MOST = 1 << 31


def is_nf4(entry: Any) -> bool:
    """Return whether the entry quantization_config of a config.json is of NF4 by bitsandbytes."""
    entry = entry if isinstance(entry, Mapping) else {}
    method, is_4bit = entry.get("quant_method"), entry.get("load_in_4bit")
    return method == "bitsandbytes" and is_4bit is True and entry.get("bnb_4bit_quant_type") == "nf4"


def without_sides(names: Iterable[str]) -> list[str]:
    """Return the names of tensors that are not beside a matrix."""
    names = list(names)
    matrices = {name.removesuffix(end) for name in names for end in (STATE, ".absmax") if name.endswith(end)}
    return [
        name for name in names if not any(name.endswith(end) and name.removesuffix(end) in matrices for end in SIDES)
    ]


@dataclass(frozen=True)
class Matrix:
    """A quantised matrix in a file. offset: mean of the scales, with double quantisation."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, int]
    offset: float | None
    read: Callable[[str], Tensor]

    def parts(self) -> dict[Part, Tensor]:
        """Return codes [out, in/2], scales [out, in/64] and, with double quantisation, the second level. Raise CheckpointError."""
        import torch

        from megatron_ft.quantization import double, nf4

        rows, columns = self.shape
        self._check_table(".quant_map", torch.tensor(nf4.LEVELS))
        codes = self.read("").reshape(-1).view(torch.uint8)  # some are stored as another type of the same bytes
        scales = rows * columns // BLOCK
        absmax = self._part(".absmax", scales, torch.float32 if self.offset is None else torch.uint8)
        if codes.numel() * 2 != rows * columns:
            raise CheckpointError(
                f"{self.name} has {codes.numel()} bytes, not those of {list(self.shape)}: fetch the file again"
            )
        found: dict[Part, Tensor] = {"codes": codes.reshape(rows, -1), "absmax": absmax.reshape(rows, -1)}
        if self.offset is not None:
            self._check_table(".nested_quant_map", double.levels())
            nested = self._part(".nested_absmax", nested_size(scales) - 1, torch.float32)
            found["nested"] = torch.cat([nested, torch.tensor([self.offset])])
        return found

    def dense(self) -> Tensor:
        """Return the dequantised matrix, as bitsandbytes does."""
        from megatron_ft.quantization import double, nf4

        parts = self.parts()
        absmax = parts["absmax"]
        if "nested" in parts:
            absmax = double.dequantise(absmax, *double.spread(parts["nested"], (absmax.shape[0], absmax.shape[1])))
        return nf4.dequantise(parts["codes"], absmax, self.dtype)

    def _part(self, end: str, count: int, dtype: torch.dtype) -> Tensor:
        found = self.read(end).reshape(-1)
        if found.numel() != count or found.dtype != dtype:
            raise CheckpointError(
                f"{self.name}{end} has {found.numel()} entries of {found.dtype}, not {count} of {dtype}: fetch the file again"
            )
        return found

    def _check_table(self, end: str, levels: Tensor) -> None:
        table = self.read(end).reshape(-1).float()
        if table.shape != levels.shape or not bool((table - levels).abs().max() < 1e-6):
            raise CheckpointError(f"{self.name}{end}: these are not the levels of NF4; give the unquantised model")


def open_matrix(name: str, where: Path, read: Callable[[str], Tensor]) -> Matrix:
    """Open a matrix by what is beside it. read: returns the tensor with that ending. Raise CheckpointError, naming it."""
    try:
        data = bytes(read(STATE).numpy())
        state: Any = json.loads(data) if len(data) < _MOST_BYTES else None
        kind = {value: key for key, value in HF_NAMES.items()}[state["dtype"]]
        sizes = tuple(state["shape"])
        offset = state.get("nested_offset")
        plain = all(type(n) is int and 0 < n < _MOST for n in sizes) and len(sizes) == 2
        number = offset is None or (isinstance(offset, float | int) and abs(offset) < 1e30)
        if not plain or not number:
            raise ValueError("sizes that are none")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{where}: {name}{STATE} is damaged ({error}): fetch the file again") from error
    blocks = (state.get("quant_type"), state.get("blocksize"), state.get("nested_blocksize", NESTED_BLOCK))
    if blocks != ("nf4", BLOCK, NESTED_BLOCK) or sizes[1] % BLOCK:
        raise CheckpointError(
            f"{where}: {name} {list(sizes)} is {blocks[0]} in blocks of {blocks[1]}: only NF4 in blocks of {BLOCK} within a row is read; "
            f"give the unquantised model"
        )
    return Matrix(name, torch_dtype(kind), (sizes[0], sizes[1]), None if offset is None else float(offset), read)

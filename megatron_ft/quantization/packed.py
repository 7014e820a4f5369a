"""Codes of GPTQ as files hold them: the GPTQ format (version 1), and compressed-tensors' pack-quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_ft.quantization.gptq import Codes, Grid

GPTQ_BITS = (2, 4, 8)
"""Those that fill a word of 32 bits."""


def words(values: Tensor, bits: int) -> Tensor:
    """Pack the last axis into int32, the first value in the lowest bits. Values from 0; a last word may be partly empty."""
    per_word = 32 // bits
    rest = -values.shape[-1] % per_word
    padded = torch.nn.functional.pad(values.long(), (0, rest))
    shifts = torch.arange(per_word) * bits
    packed = (padded.reshape(*values.shape[:-1], -1, per_word) << shifts).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def unpacked(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the inverse of `words`: `count` values along the last axis."""
    shifts = torch.arange(32 // bits) * bits
    values = (packed.long()[..., None] >> shifts) & (2**bits - 1)
    return values.flatten(-2)[..., :count].int()


def gptq_tensors(found: Codes, grid: Grid) -> dict[str, Tensor]:
    """Return the tensors beside a linear's name in the GPTQ format: matrices are [in, out], zero points are stored less 1."""
    return {
        "qweight": words(found.codes, grid.bits).t().contiguous(),
        "qzeros": words(found.zeros.t() - 1, grid.bits).contiguous(),
        "scales": found.scales.t().contiguous(),
        "g_idx": found.groups,
    }


def compressed_tensors(found: Codes, grid: Grid) -> dict[str, Tensor]:
    """Return the tensors beside a linear's name in the format of compressed-tensors, symmetric."""
    return {
        "weight_packed": words(found.codes, grid.bits),
        "weight_scale": found.scales.contiguous(),
        "weight_shape": torch.tensor(found.codes.shape),
    }


def gptq_entry(grid: Grid) -> dict[str, Any]:
    """Return quantization_config of config.json for the GPTQ format."""
    return {
        "quant_method": "gptq",
        "bits": grid.bits,
        "group_size": grid.group_size,
        "desc_act": grid.groups_follow,
        "sym": grid.symmetric,
        "checkpoint_format": "gptq",
    }


def compressed_entry(grid: Grid) -> dict[str, Any]:
    """Return quantization_config of config.json for compressed-tensors."""
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "strategy": "group",
        "group_size": grid.group_size,
        "symmetric": True,
        "actorder": "weight" if grid.desc_act else None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }

"""What a reader of an export computes with: weights as NF4, LLM.int8() and GGUF's types have them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from checkpoints_conversion.gguf_model import KINDS, decoded, encoded, tensors_of
from megatron_ft.errors import CheckpointError
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.quantised import is_quantised
from megatron_ft.models.weights import Placed
from megatron_ft.quantization import nf4

Rounder = Callable[[Placed, str, Tensor], Tensor]
"""f(placed, name in Hugging Face, weight) -> the weight as a file has it."""


def rounder(quantize: str, arch: Architecture, placed: list[Placed]) -> Rounder:
    """Return the function for a kind of export. placed: all tensors of the model."""
    if quantize in KINDS:
        return _in_gguf(quantize, arch, placed)
    return _int8 if quantize == "int8" else _nf4


def int8_codes(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes, and the largest absolute number of each row. Raise CheckpointError for one beyond fp16."""
    half = weight.half()
    largest = half.abs().amax(1).float()
    if not bool(largest.isfinite().all()):
        raise CheckpointError(f"{name} has numbers beyond fp16, which LLM.int8() starts from: choose nf4")
    return torch.round(half * (127 / largest).nan_to_num(0.0, 0.0, 0.0)[:, None]).to(torch.int8), largest


def int8_dense(codes: Tensor, largest: Tensor) -> Tensor:
    return codes * (largest / 127)[:, None]


def _int8(one: Placed, name: str, weight: Tensor) -> Tensor:
    return int8_dense(*int8_codes(name, weight)) if is_quantised(one.rule) else weight


def _nf4(one: Placed, name: str, weight: Tensor) -> Tensor:
    if not is_quantised(one.rule):
        return weight
    found = nf4.quantise(weight, name)
    return nf4.dequantise(found.codes, found.absmax, weight.dtype)


def _in_gguf(quantize: str, arch: Architecture, placed: list[Placed]) -> Rounder:
    """Rows have another order in the file, not other numbers."""
    from gguf import GGMLQuantizationType

    stored = {one.hf_name: one for one in tensors_of(arch, placed, GGMLQuantizationType[KINDS[quantize]])}
    return lambda _, name, weight: decoded(stored[name], encoded(stored[name], weight))

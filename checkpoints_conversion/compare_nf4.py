"""Compares the linears of a quantised checkpoint with those of a Hugging Face model.

The model may have the same weights dequantised (an export of the checkpoint, or a model saved with bitsandbytes), or be the original: then
its weights are quantised again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from checkpoints_conversion.megatron_source import Opened
from checkpoints_conversion.torch_zip import as_bytes
from megatron_ft.errors import CheckpointError
from megatron_ft.models.dtypes import cast
from megatron_ft.models.hf_source import HfSource
from megatron_ft.models.quantised import is_quantised, parts_of
from megatron_ft.models.weights import Placed
from megatron_ft.quantization import double, nf4

PLAIN = "bit for bit"
DEQUANTISED = "bit for bit, the linears as dequantised NF4"
CODES = "the NF4 of the linears is that of the model's weights, all other tensors bit for bit"


def in_words(equal: str, tensors: int) -> str:
    """Return what was compared, for people. equal: one of the above."""
    if equal == CODES:
        return f"{tensors} tensors are the same: the linears quantised again, the others bit-identical"
    return f"{tensors} tensors are bit-identical" + (", the linears dequantised" if equal == DEQUANTISED else "")


def compare_linear(source: HfSource, placed: Placed, opened: Opened) -> str:
    """Return which of the above holds for a quantised weight. Raise CheckpointError if none does."""
    theirs = cast(source.full(placed), opened.config.dtype, placed.key)
    if as_bytes(theirs) == as_bytes(opened.full(placed)):
        return DEQUANTISED
    if not all(_same_nf4(source, placed, number, name, opened) for number, name in enumerate(placed.hf_keys)):
        raise CheckpointError(
            f"{placed.key} differs between {source.folder} and {opened.folder}: its weights are neither those of the checkpoint, "
            f"dequantised, nor do they have its NF4"
        )
    return CODES


def is_compared(placed: Placed, opened: Opened) -> bool:
    return opened.config.quantization is not None and is_quantised(placed.rule)


def _same_nf4(source: HfSource, placed: Placed, number: int, name: str, opened: Opened) -> bool:
    """Return whether a matrix of the model, quantised, is what the checkpoint has. With double quantisation the scales may be one step off
    the nearest, as bitsandbytes writes some.
    """
    quantization, arch, stored = opened.config.quantization, opened.config.architecture, opened.stored
    assert quantization is not None and stored is not None
    theirs = nf4.quantise(cast(source.tensor(name), opened.config.dtype, name), name)
    parts = parts_of(placed, quantization)
    ours = {part: one.rule.to_hf(arch, stored(one))[number] for part, one in parts.items()}
    if not torch.equal(theirs.codes, ours["codes"]):
        return False
    if not quantization.double_quant:
        return torch.equal(theirs.absmax, ours["absmax"])
    return _same_second_level(theirs.absmax, ours["absmax"], ours["nested"])


def _same_second_level(absmax: Tensor, codes: Tensor, nested: Tensor) -> bool:
    expected, mean = double.quantise(absmax, nested[-1]), absmax.double().mean()
    steps = (expected.codes.int() - codes.int()).abs().max()
    return torch.equal(expected.nested, nested) and bool(steps <= 1) and bool((mean - nested[-1]).abs() <= 1e-5 * mean)

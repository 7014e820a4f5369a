"""The two names of a floating-point type: ours (flags, config.json) and torch's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_ft.errors import CheckpointError

if TYPE_CHECKING:
    import torch

HF_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Our name -> torch's, which is also the name in a Hugging Face config.json."""


def torch_dtype(name: str) -> torch.dtype:
    import torch

    return getattr(torch, HF_NAMES[name])


def name_of(dtype: torch.dtype, what: str = "weights") -> str:
    """Return our name of a type. Raise CheckpointError for integers, fp8 and similar types of quantised weights."""
    text = str(dtype).removeprefix("torch.")
    for name, hf_name in HF_NAMES.items():
        if text == hf_name:
            return name
    raise CheckpointError(f"{what} is of type {text}: give the unquantised model (fp32, bf16 or fp16)")


def cast(tensor: torch.Tensor, dtype: str | None, what: str) -> torch.Tensor:
    """Return the tensor in another type; None: unchanged. Raise CheckpointError if a number would overflow."""
    if dtype is None or tensor.dtype == torch_dtype(dtype):
        return tensor
    result = tensor.to(torch_dtype(dtype))
    if dtype == "fp16" and bool((result.isinf() & tensor.isfinite()).any()):
        raise CheckpointError(f"{what} holds numbers too large for fp16 (65504): use --params_dtype bf16 or fp32")
    return result

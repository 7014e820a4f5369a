"""Which code dequantises NF4 on this machine: bitsandbytes' kernel on a GPU where it is installed and works, else torch's operations.

Both give the same bits. The kernel reads codes and scales once and writes the weight; torch's operations need 8 bytes of temporary memory
per weight and are slower.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from megatron_ft import device
from megatron_ft.log import logger
from megatron_ft.quantization import nf4
from megatron_ft.quantization.sizes import BLOCK


@functools.cache
def dequantiser() -> nf4.Dequantise:
    """Return f(codes, absmax, dtype) -> weight for this machine. On a GPU the first call tries bitsandbytes and logs the choice."""
    if not device.has_gpu():
        return nf4.dequantise
    why = try_bitsandbytes()
    by = "bitsandbytes" if why is None else f"torch, which is slower: bitsandbytes is {why}"
    logger("quantization").info(f"NF4 is dequantised by {by}")
    return by_bitsandbytes if why is None else nf4.dequantise


def by_bitsandbytes(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantise as nf4.dequantise does."""
    from bitsandbytes import functional

    shape = torch.Size((codes.shape[0], 2 * codes.shape[1]))
    state = functional.QuantState(absmax.reshape(-1), shape=shape, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
    return functional.dequantize_4bit(codes.reshape(-1, 1), state)


def try_bitsandbytes() -> str | None:
    """Dequantise a small matrix with it; return why it cannot be used, None where it can."""
    try:
        import bitsandbytes  # noqa: F401
    except ModuleNotFoundError as error:
        return "not installed" if error.name == "bitsandbytes" else f"incomplete: {error}"
    except Exception as error:  # a library built for another torch fails in many ways
        return f"installed but cannot be imported ({_first_line(error)})"
    codes = torch.arange(256, dtype=torch.uint8, device=device.current_device()).reshape(2, 128)
    absmax = torch.arange(1, 9, dtype=torch.float32, device=codes.device).reshape(2, 4) / 7
    try:
        same = torch.equal(
            by_bitsandbytes(codes, absmax, torch.bfloat16), nf4.dequantise(codes, absmax, torch.bfloat16)
        )
    except Exception as error:
        return f"installed but does not run on this GPU ({_first_line(error)})"
    return None if same else "installed but gives other numbers"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

"""bitsandbytes/functional.py: QuantState and dequantize_4bit."""

import torch

calls = 0
broken = False
"""it gives other numbers, as a library for another GPU might"""


class QuantState:
    def __init__(
        self, absmax, shape=None, code=None, blocksize=None, quant_type=None, dtype=None, offset=None, state2=None
    ):
        self.absmax, self.shape, self.code, self.dtype, self.blocksize = absmax, shape, code, dtype, blocksize
        self.quant_type, self.offset, self.state2, self.nested = quant_type, offset, state2, state2 is not None


def dequantize_4bit(A, quant_state=None, absmax=None, out=None, blocksize=None, quant_type="fp4"):
    """A: uint8 [n/2, 1] on a GPU."""
    global calls
    calls += 1
    state = quant_state
    if state.quant_type != "nf4" or state.blocksize != 64 or state.nested or absmax is not None or out is not None:
        raise NotImplementedError("this stub knows one level of NF4 in blocks of 64")
    rows, columns = state.shape
    right = A.is_cuda and state.absmax.is_cuda and A.dtype == torch.uint8 and state.absmax.dtype == torch.float32
    if not right or A.shape != (rows * columns // 2, 1) or state.absmax.shape != (rows * columns // 64,):
        raise ValueError(f"{A.dtype} {tuple(A.shape)} on {A.device}, {state.absmax.dtype} {tuple(state.absmax.shape)}")
    if not A.is_contiguous() or not state.absmax.is_contiguous():
        raise ValueError("a kernel reads memory in order")
    return _weights(A, state).to(state.dtype).reshape(rows, columns) * (2 if broken else 1)


def _weights(A, state):
    from megatron_ft.quantization.nf4 import LEVELS

    codes = torch.stack([A >> 4, A & 15], -1).reshape(-1, 64)
    found = torch.zeros(codes.shape, device=A.device)
    for code, level in enumerate(LEVELS):
        found += (codes == code) * level
    return found * state.absmax[:, None]

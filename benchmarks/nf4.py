"""Times NF4 on one CPU thread beside bitsandbytes (if installed) and a plain linear, in the same run.

    python benchmarks/nf4.py [--size 2048] [--rows 512]

A product is that of a frozen linear: forward and the gradient of the input. Each time is the best of five, in CPU time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ft.quantization import nf4
from megatron_ft.quantization.frozen import _Product


def milliseconds(run: Callable[[], object], times: int = 5) -> float:
    run()
    found = []
    for _ in range(times):
        started = time.process_time()
        run()
        found.append(time.process_time() - started)
    return min(found) * 1e3


def trained(product: Callable[[Tensor], Tensor], rows: int, size: int, dtype: torch.dtype) -> Callable[[], None]:
    x = torch.randn(rows, size, dtype=dtype, requires_grad=True)
    return lambda: product(x).sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=512)
    options = parser.parse_args()
    size, rows = options.size, options.rows
    torch.set_num_threads(1)
    weight = torch.randn(size, size) * 0.02
    codes, absmax = nf4.quantise(weight)
    ours: dict[str, Callable[[], object]] = {"quantise": lambda: nf4.quantise(weight)}
    plain: dict[str, Callable[[], object]] = {}
    theirs: dict[str, Callable[[], object]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        dense = nf4.dequantise(codes, absmax, dtype)
        ours[f"dequantise to {name}"] = lambda dtype=dtype: nf4.dequantise(codes, absmax, dtype)
        frozen = lambda x: _Product.apply(x, codes, absmax, nf4.dequantise)  # noqa: E731
        ours[f"product in {name}"] = trained(frozen, rows, size, dtype)
        plain[f"product in {name}"] = trained(lambda x, dense=dense: x @ dense.t(), rows, size, dtype)
    try:
        import bitsandbytes.functional as bnb
    except ImportError:
        print("bitsandbytes is not installed")
    else:
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64)
        theirs["quantise"] = lambda: bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64)
        theirs["dequantise to float32"] = lambda: bnb.dequantize_4bit(packed, state)
    print(f"{size} x {size}, {rows} rows, one thread; milliseconds of CPU time")
    for name, run in ours.items():
        found = milliseconds(run)
        line = f"{name:24} ours {found:8.1f}"
        for who, others in (("plain linear", plain), ("bitsandbytes", theirs)):
            if name in others:
                other = milliseconds(others[name])
                line += f"   {who} {other:8.1f}   ratio {found / other:.2f}"
        print(line)
    held = codes.numel() + 4 * absmax.numel()
    print(f"held: {held:,} bytes, plain bf16 {2 * weight.numel():,}, ratio {held / (2 * weight.numel()):.3f}")


if __name__ == "__main__":
    main()

"""The share of a GPU's speed that training uses: floating-point operations of a step, divided by time and peak.

Only the operations that the model needs are counted: no padding, no recomputation. For matrix products, forward and backward, 6 per
weight and token (Kaplan et al. 2020), without embedding look-ups. For attention, 12 x layers x heads x head size for each pair of tokens
in which one attends to the other (Chowdhery et al. 2022, appendix B, with only the causal half, and with windows and packed samples).
"""

from __future__ import annotations

import re

import numpy as np

from megatron_ft.models.architecture import Architecture

PEAKS = (
    (r"GB200|B200", 2250), (r"H200|GH200|H100 (?!PCIe)|H100$", 989), (r"H100 PCIe", 756), (r"H20\b", 148), (r"A100", 312),
    (r"L40S", 362), (r"L40", 181), (r"L4\b", 121), (r"A10G", 70), (r"A10\b", 125), (r"RTX 6000 Ada", 364), (r"A6000", 155),
    (r"RTX 5090", 210), (r"RTX 4090", 165), (r"RTX 3090", 71), (r"V100", 125), (r"T4", 65), (r"MI300X", 1307), (r"MI250", 362),
)  # fmt: skip
"""Pattern of the name that the driver reports -> dense bf16 (before Ampere: fp16) TFLOP/s. Source: the makers' data sheets."""


def peak_tflops(name: str) -> float | None:
    """Return the peak of a device; None if it is not in the table."""
    return next((float(peak) for pattern, peak in PEAKS if re.search(pattern, name)), None)


def matrix_weights(arch: Architecture) -> int:
    """Return the number of weights that multiply activations, in the whole model."""
    heads = arch.head_dim * (2 * arch.num_attention_heads + 2 * arch.num_query_groups)  # q and output; k and v
    mlp = arch.ffn_hidden_size * (3 if arch.gated else 2)
    return arch.hidden_size * (arch.num_layers * (heads + mlp) + arch.vocab_size)


def pairs(lengths: np.ndarray, window: int | None) -> float:
    """Return the pairs of tokens in which one attends to the other, itself included, over samples of these lengths."""
    n = np.asarray(lengths, np.float64)
    w = n if window is None else np.minimum(n, window)
    return float((n * w - w * (w - 1) / 2).sum())


def step_flops(arch: Architecture, tokens: int, seen: float) -> float:
    """Return the operations of a step, forward and backward. seen: pairs(...) of its samples; layers without a window are counted as with
    it.
    """
    attention = 12 * arch.num_layers * arch.num_attention_heads * arch.head_dim
    return 6.0 * matrix_weights(arch) * tokens + attention * seen

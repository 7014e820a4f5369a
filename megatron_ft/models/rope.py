"""Rotary frequencies: theta_i = base^(-2i/D) and what each scaling method makes of them.

Pure arithmetic on torch tensors; the model takes the result as its `inv_freq`. Formulas as in transformers' modeling_rope_utils
(linear: Chen et al. 2023; llama3: the Llama 3.1 model card).
"""

from __future__ import annotations

import math

import torch

from megatron_ft.errors import ConfigError


def inverse_frequencies(head_dim: int, base: float, scaling: dict | None, max_positions: int) -> torch.Tensor:
    """Angular step per position for each rotary pair, [head_dim / 2], fp32, radians.

    `scaling` is Architecture.rope_scaling (Hugging Face's keys). Raises ConfigError for a method this version cannot compute.
    """
    theta = 1.0 / (base ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    if not scaling:
        return theta
    method = scaling.get("rope_type", scaling.get("type", "default"))
    if method not in METHODS:
        raise ConfigError(f"rope scaling {method!r} is not supported; known: {', '.join(METHODS)}")
    return METHODS[method](theta, scaling, max_positions)


def _llama3(theta: torch.Tensor, scaling: dict, max_positions: int) -> torch.Tensor:
    """Long waves divided by the factor, short ones kept, a straight blend in between."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling.get("original_max_position_embeddings", max_positions)
    wavelength = 2 * math.pi / theta
    share = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - share) * theta / factor + share * theta


METHODS = {
    "default": lambda theta, scaling, positions: theta,
    "linear": lambda theta, scaling, positions: theta / scaling["factor"],
    "llama3": _llama3,
}

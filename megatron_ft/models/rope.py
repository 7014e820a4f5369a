"""Rotary frequencies: theta_i = base^(-2i/D), and each scaling method of them.

Only arithmetic on torch tensors. For a method that also scales queries and keys, attention_factor returns the factor m. A rotation keeps
scale factors, so logits are scaled by m^2; the model puts this into its softmax scale, which is exact for packed and cached input alike.

Sources: linear: Chen et al. 2023; yarn: Peng et al. 2023; llama3: the Llama 3.1 model card; dynamic, yarn, llama3 and longrope as in
transformers' modeling_rope_utils. ntk, ntk-margin, ntk-yarn: LightOn's Alfred-40B; ntk-by-parts: Airophin-13B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import torch

from megatron_ft.config.expected import RopeScaling
from megatron_ft.config.hints import alternatives
from megatron_ft.errors import ConfigError
from megatron_ft.models.architecture import Architecture

BASE_METHODS = ("ntk", "ntk-margin", "ntk-yarn")
"""Methods that do nothing to the frequencies but raise the base."""
LENGTH_METHODS = ("dynamic", "longrope")
"""Methods whose frequencies depend on how long the text is."""


def inverse_frequencies(
    head_dim: int, base: float, scaling: Mapping[str, Any] | None, max_positions: int, length: int | None = None
) -> torch.Tensor:
    """Return the angular step per position for each rotary pair, [head_dim / 2], fp32, radians.

    scaling: Architecture.rope_scaling. length: positions of the longest text, for LENGTH_METHODS; None: within the original context. Raise
    ConfigError for a method that is not supported.
    """
    method, scaling = method_of(scaling), scaling or {}
    if method in BASE_METHODS:
        base = scaled_base(head_dim, base, scaling)
    elif method == "dynamic" and length is not None and length > max_positions:
        stretch = scaling["factor"] * length / max_positions - (scaling["factor"] - 1)
        base = base * stretch ** (head_dim / (head_dim - 2))
    theta = _theta(head_dim, base)
    original = scaling.get("original_max_position_embeddings") or max_positions
    if method == "linear":
        return theta / scaling["factor"]
    if method == "llama3":
        return _llama3(theta, scaling, original)
    if method == "yarn":
        return _yarn(theta, base, scaling, original)
    if method == "ntk-by-parts":
        return _by_parts(theta, base, scaling["factor"], original)
    if method == "longrope":
        beyond = length is not None and length > original
        return theta / torch.tensor(scaling["long_factor" if beyond else "short_factor"], dtype=torch.float32)
    return theta


def attention_factor(scaling: Mapping[str, Any] | None, max_positions: int) -> float:
    """Return m, by which both queries and keys are scaled; 1.0 for most methods."""
    method, scaling = method_of(scaling), scaling or {}
    if method not in ("yarn", "ntk-yarn", "longrope"):
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    original = scaling.get("original_max_position_embeddings") or max_positions
    factor = scaling.get("factor") or max_positions / original
    if method == "longrope":
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return _mscale(factor, scaling["mscale"]) / _mscale(factor, scaling["mscale_all_dim"])
    return _mscale(factor)


def scaled_base(head_dim: int, base: float, scaling: Mapping[str, Any]) -> float:
    """Return the base that one of BASE_METHODS uses instead of `base`."""
    stretch = scaling["factor"] + (0 if method_of(scaling) == "ntk" else 1)
    return base * stretch ** (head_dim / (head_dim - 2))


def method_of(scaling: Mapping[str, Any] | None) -> str:
    """Raise ConfigError for an unknown one."""
    method = scaling["rope_type"] if scaling else "default"
    if method not in METHODS:
        raise ConfigError(f"rope scaling {method!r} is not supported; known: {', '.join(METHODS)}")
    return method


METHODS = ("default", "linear", *BASE_METHODS, "ntk-by-parts", "yarn", "dynamic", "llama3", "longrope")
EXTENDING: tuple[str, ...] = get_args(RopeScaling)
"""Methods that a factor alone describes: those that `extend` takes."""


def extend(arch: Architecture, method: str, factor: float) -> Architecture:
    """Return the model with its context extended by `factor`. A factor of 1 changes nothing, whatever the method.

    Raise ConfigError for a model that is already scaled, a method that needs more than a factor, or a factor below 1.
    """
    if method not in EXTENDING:
        raise ConfigError(
            f"rope scaling {method!r} cannot be chosen by a factor; choose one of "
            f"{', '.join(EXTENDING)}{alternatives(method, EXTENDING)}"
        )
    if factor < 1:
        raise ConfigError(f"rope scaling factor {factor}: must be at least 1 (1: unscaled)")
    if factor == 1:
        return arch
    if arch.rope_scaling:
        raise ConfigError(f"the model's rope is scaled already ({arch.rope_scaling}); it cannot be scaled again")
    original = arch.max_position_embeddings
    scaling = {"rope_type": method, "factor": float(factor), "original_max_position_embeddings": original}
    # dynamic computes its factor from the model's positions, which are unchanged.
    positions = original if method == "dynamic" else int(original * factor)
    return replace(arch, rope_scaling=scaling, max_position_embeddings=positions)


def correction_range(
    fast: float, slow: float, head_dim: int, base: float, original: int, truncate: bool = True
) -> tuple[float, float]:
    """Return the pairs between which a ramp runs: from those that turn `fast` times over the original context to those that turn `slow`
    times.
    """
    low, high = (head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (fast, slow))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, head_dim - 1)


def _theta(head_dim: int, base: float) -> torch.Tensor:
    return 1.0 / (base ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))


def _mask(low: float, high: float, pairs: int) -> torch.Tensor:
    """Return 1 before the ramp, 0 after it, [pairs]."""
    high = high + 0.001 if low == high else high
    return 1 - ((torch.arange(pairs, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn(theta: torch.Tensor, base: float, scaling: Mapping[str, Any], original: int) -> torch.Tensor:
    turns = scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1
    ends = correction_range(*turns, 2 * len(theta), base, original, scaling.get("truncate", True))
    mask = _mask(*ends, len(theta))
    return theta / scaling["factor"] * (1 - mask) + theta * mask


def _by_parts(theta: torch.Tensor, base: float, factor: float, original: int) -> torch.Tensor:
    """Interpolate slow pairs, raise the base for middle ones, keep fast ones: two ramps in sequence."""
    head_dim = 2 * len(theta)
    raised = _theta(head_dim, base * factor ** (head_dim / (head_dim - 2)))
    slow = _mask(*correction_range(1.25, 0.75, head_dim, base, original), len(theta))
    fast = _mask(*correction_range(16, 2, head_dim, base, original), len(theta))
    return (theta / factor * (1 - slow) + raised * slow) * (1 - fast) + theta * fast


def _llama3(theta: torch.Tensor, scaling: Mapping[str, Any], original: int) -> torch.Tensor:
    """Divide long waves by the factor, keep short ones, interpolate linearly between them."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / theta
    share = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - share) * theta / factor + share * theta

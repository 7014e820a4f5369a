"""Qwen2 and Qwen2.5: Llama with biases on query, key and value; the upper layers may have a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_ft.errors import CheckpointError
from megatron_ft.models import hf_config, llama
from megatron_ft.models.architecture import Architecture

NAME = "qwen2"
MODEL_TYPES = ("qwen2",)
HF_CLASSES = ("Qwen2ForCausalLM",)
ACTIVATION = hf_config.GATED_MLP

rules = llama.rules


def from_hf(config: Mapping[str, Any]) -> Architecture:
    """Convert as llama.from_hf."""
    window = window_fields(config)
    return hf_config.read(config, NAME, taken=window_keys(window), positions=32768, groups=32, qkv_bias=True, **window)


def to_hf(arch: Architecture, dtype: str | None = None) -> dict[str, Any]:
    return hf_config.write(arch, NAME, HF_CLASSES[0], dtype, **window_entries(arch))


def window_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return Architecture's fields of the window; empty where it is not used, whatever size the config gives."""
    if "num_hidden_layers" not in config:
        return {}  # hf_config.read refuses it
    layers, types = config["num_hidden_layers"], config.get("layer_types")
    used = bool(config.get("use_sliding_window"))
    first = config.get("max_window_layers", 28) if used else layers
    expected = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    window = {"sliding_window": config.get("sliding_window", 4096)} if used else {}
    if types is None or list(types) == expected:
        return window and {**window, "full_attention_layers": first}
    if not used or len(types) != layers or not set(types) <= set(_TYPES):
        raise CheckpointError(
            f"config.json: layer_types must be {layers} of {' and '.join(_TYPES)}, the latter with use_sliding_window, which is {used}"
        )
    return {**window, "window_layers": tuple(n for n, kind in enumerate(types) if kind == _TYPES[1])}


_TYPES = ("full_attention", "sliding_attention")


def window_keys(window: Mapping[str, Any]) -> tuple[str, ...]:
    return ("use_sliding_window", "layer_types", *(("sliding_window", "max_window_layers") if window else ()))


def window_entries(arch: Architecture) -> dict[str, Any]:
    """Return the inverse of window_fields."""
    if arch.sliding_window is None:
        return {"use_sliding_window": False}
    sizes = {"use_sliding_window": True, "sliding_window": arch.sliding_window}
    if arch.window_layers is None:
        return {**sizes, "max_window_layers": arch.full_attention_layers}
    return {**sizes, "layer_types": [_TYPES[arch.has_window(layer)] for layer in range(arch.num_layers)]}

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

rules = llama.rules


def from_hf(config: Mapping[str, Any]) -> Architecture:
    """As llama.from_hf."""
    window = window_fields(config)
    return hf_config.read(config, NAME, taken=window_keys(window), qkv_bias=True, **window)


def to_hf(arch: Architecture, dtype: str | None = None) -> dict[str, Any]:
    return hf_config.write(arch, NAME, HF_CLASSES[0], dtype, **window_entries(arch))


def window_fields(config: Mapping[str, Any]) -> dict[str, int]:
    """Architecture's fields of the window; empty where it is not used, whatever size the config gives."""
    layers, types = config.get("num_hidden_layers", 0), config.get("layer_types")
    used = bool(config.get("use_sliding_window"))
    first = config.get("max_window_layers", 28) if used else layers
    said = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    if types is not None and list(types) != said:
        raise CheckpointError(
            f"config.json: layer_types do not follow from use_sliding_window {used} and max_window_layers {first}: "
            "only windows from one layer upward are supported"
        )
    if not used:
        return {}
    return {"sliding_window": config.get("sliding_window", 4096), "full_attention_layers": first}


def window_keys(window: Mapping[str, int]) -> tuple[str, ...]:
    return ("use_sliding_window", "layer_types", *(("sliding_window", "max_window_layers") if window else ()))


def window_entries(arch: Architecture) -> dict[str, Any]:
    """Inverse of window_fields."""
    if arch.sliding_window is None:
        return {"use_sliding_window": False}
    sizes = {"sliding_window": arch.sliding_window, "max_window_layers": arch.full_attention_layers}
    return {"use_sliding_window": True, **sizes}

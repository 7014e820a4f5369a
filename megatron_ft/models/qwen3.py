"""Qwen3: Llama with a norm on every query and key head, and an independent head size (head_dim)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_ft.models import hf_config, llama
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.qwen2 import window_entries, window_fields, window_keys

NAME = "qwen3"
MODEL_TYPES = ("qwen3",)
HF_CLASSES = ("Qwen3ForCausalLM",)
ACTIVATION = hf_config.GATED_MLP

rules = llama.rules


def from_hf(config: Mapping[str, Any]) -> Architecture:
    """Convert as llama.from_hf."""
    window = window_fields(config)
    return hf_config.read(
        config, NAME, taken=window_keys(window), positions=32768, groups=32, head_dim=128, qk_norm=True, **window
    )


def to_hf(arch: Architecture, dtype: str | None = None) -> dict[str, Any]:
    return hf_config.write(arch, NAME, HF_CLASSES[0], dtype, attention_bias=False, **window_entries(arch))

"""Mistral: Llama with a sliding window, in which a token sees `sliding_window` keys, itself included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_ft.models import hf_config, llama
from megatron_ft.models.architecture import Architecture

NAME = "mistral"
MODEL_TYPES = ("mistral",)
HF_CLASSES = ("MistralForCausalLM",)
ACTIVATION = hf_config.GATED_MLP

rules = llama.rules


def from_hf(config: Mapping[str, Any]) -> Architecture:
    """Convert as llama.from_hf. Without an entry the window is transformers' default of 4096; null: none."""
    window = config.get("sliding_window", 4096) or None
    return hf_config.read(config, NAME, taken=("sliding_window",), positions=131072, groups=8, sliding_window=window)


def to_hf(arch: Architecture, dtype: str | None = None) -> dict[str, Any]:
    return hf_config.write(arch, NAME, HF_CLASSES[0], dtype, sliding_window=arch.sliding_window)

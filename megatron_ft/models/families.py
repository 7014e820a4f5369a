"""The families this project knows, and which of them a Hugging Face config belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from megatron_ft.errors import CheckpointError
from megatron_ft.models import falcon, llama, mistral, qwen2, qwen3
from megatron_ft.models.architecture import Architecture

FAMILIES: dict[str, ModuleType] = {family.NAME: family for family in (llama, mistral, qwen2, qwen3, falcon)}
"""name -> module with from_hf(config), to_hf(arch, dtype), rules(arch), MODEL_TYPES and HF_CLASSES."""


def family_for(hf_config: Mapping[str, Any]) -> ModuleType:
    """By model_type, else by architectures. Raises CheckpointError naming what is supported."""
    model_type, classes = hf_config.get("model_type"), hf_config.get("architectures") or []
    for family in FAMILIES.values():
        if model_type in family.MODEL_TYPES or (model_type is None and set(classes) & set(family.HF_CLASSES)):
            return family
    raise CheckpointError(
        f"model_type {model_type!r} (architectures {classes}) is not supported; supported: {', '.join(FAMILIES)}"
    )


def family_of(arch: Architecture) -> ModuleType:
    """The module of an Architecture's family."""
    if arch.family not in FAMILIES:
        raise CheckpointError(f"family {arch.family!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[arch.family]

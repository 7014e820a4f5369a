"""The supported model families. Finds the family of a Hugging Face config."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from megatron_ft.errors import CheckpointError
from megatron_ft.models import falcon, llama, mistral, qwen2, qwen3
from megatron_ft.models.architecture import MOST_LAYERS, Architecture

FAMILIES: dict[str, ModuleType] = {family.NAME: family for family in (llama, mistral, qwen2, qwen3, falcon)}
"""name -> module with from_hf(config), to_hf(arch, dtype), rules(arch), MODEL_TYPES, HF_CLASSES and ACTIVATION."""


def family_for(hf_config: Mapping[str, Any]) -> ModuleType:
    """Return the family of a config, by model_type, else by architectures. Raise CheckpointError for an unsupported one."""
    model_type, classes = hf_config.get("model_type"), hf_config.get("architectures") or []
    for family in FAMILIES.values():
        if model_type in family.MODEL_TYPES or (model_type is None and set(classes) & set(family.HF_CLASSES)):
            return family
    raise CheckpointError(
        f"model_type {model_type!r} (architectures {classes}) is not supported; supported: {', '.join(FAMILIES)}"
    )


def parse_hf_config(hf_config: Any) -> tuple[ModuleType, Architecture]:
    """Return (family, architecture) of the content of a config.json. Raise CheckpointError for an invalid entry."""
    if not isinstance(hf_config, dict):
        raise CheckpointError("config.json is not a Hugging Face config; fetch the file again")
    _check_kinds(hf_config)
    try:
        family = family_for(hf_config)
        return family, family.from_hf(hf_config)
    except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:
        raise CheckpointError(
            f"config.json: an entry is of another type than it should be ({error}); fetch the file again"
        ) from error


_SIZES = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"),
    *("max_position_embeddings", "n_layer", "n_head"),
)
_NUMBERS = ("rms_norm_eps", "layer_norm_epsilon", "rope_theta")
_OBJECTS = ("rope_parameters", "rope_scaling")


def _check_kinds(config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for an entry of another type than calculations with it need, before a loop runs over the layers."""
    for key in _SIZES:
        most = MOST_LAYERS if "layer" in key else 10**9
        value = config.get(key, 1)
        if type(value) is not int or not 1 <= value <= most:
            raise CheckpointError(f"config.json: {key} {_shown(value)}: must be a whole number from 1 to {most}")
    for key in _NUMBERS:
        value = config.get(key, 1)
        absent = key == "rope_theta" and value is None
        if not absent and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf):
            raise CheckpointError(f"config.json: {key} {_shown(value)}: must be a number above 0")
    for key in _OBJECTS:
        if not isinstance(config.get(key), dict | None):
            raise CheckpointError(f"config.json: {key} {_shown(config[key])}: must be an object or null")


def _shown(value: Any) -> str:
    """Return a value as config.json has it."""
    return json.dumps(value, default=str)[:80]


def family_of(arch: Architecture) -> ModuleType:
    """Return the module of an Architecture's family."""
    if arch.family not in FAMILIES:
        raise CheckpointError(f"family {arch.family!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[arch.family]

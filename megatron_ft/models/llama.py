"""The Llama family: RMSNorm, SwiGLU, rotary embeddings, grouped-query attention, no biases (Llama 1-3, TinyLlama, ...).

Source of the entries: transformers' LlamaConfig, in the spelling of version 4 (rope_theta, rope_scaling, torch_dtype)
and of version 5 (rope_parameters, dtype). Both are read, both are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_ft.errors import CheckpointError
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.weights import (
    Rule,
    Shape,
    halve_rows,
    linear_qkv_shapes,
    merge_qkv,
    split_qkv,
    stack_rows,
)

NAME = "llama"
MODEL_TYPES = ("llama",)
HF_CLASSES = ("LlamaForCausalLM",)

_MUST_BE = {
    "attention_bias": (False, "biases in the attention projections"),
    "mlp_bias": (False, "biases in the MLP"),
    "hidden_act": ("silu", "another activation than silu"),
    "quantization_config": (None, "quantised weights: give the unquantised model"),
    "auto_map": (None, "code of its own (auto_map): only models that transformers itself implements are read"),
}
_ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_RENAMED = (  # what an Architecture says with its own fields
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
)
_RESTATED = ("model_type", "architectures", "dtype", "torch_dtype", "_name_or_path", "transformers_version")
_NOT_CARRIED = {*_RENAMED, *_RESTATED, *_MUST_BE}


def from_hf(config: Mapping[str, Any]) -> Architecture:
    """A Hugging Face config.json -> Architecture. Raises CheckpointError with the reason for what is not supported."""
    for key, (supported, reason) in _MUST_BE.items():
        if config.get(key, supported) not in (supported, None):
            raise CheckpointError(f"config.json: {key} {config[key]!r} is not supported: {reason}")
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        theta, scaling = _rope_from_hf(config)
        return Architecture(
            family=NAME,
            num_layers=config["num_hidden_layers"],
            hidden_size=hidden,
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            vocab_size=config["vocab_size"],
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            norm_epsilon=config.get("rms_norm_eps", 1e-6),
            tied_embeddings=config.get("tie_word_embeddings", False),
            rope_theta=theta,
            rope_scaling=scaling,
            hf={key: value for key, value in config.items() if key not in _NOT_CARRIED},
        )
    except KeyError as error:
        raise CheckpointError(f"config.json: entry {error} is missing; it is not a complete Llama config") from error


def to_hf(arch: Architecture, dtype: str | None = None) -> dict[str, Any]:
    """Inverse of from_hf, in the keys of transformers 4 and 5. `dtype`: as transformers names it, "bfloat16"."""
    scaling = arch.rope_scaling
    return {
        **arch.hf,
        "architectures": list(HF_CLASSES),
        "model_type": "llama",
        "num_hidden_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.num_query_groups,
        "head_dim": arch.head_dim,
        "vocab_size": arch.vocab_size,
        "max_position_embeddings": arch.max_position_embeddings,
        "rms_norm_eps": arch.norm_epsilon,
        "tie_word_embeddings": arch.tied_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": arch.rope_theta,
        "rope_scaling": scaling and {**scaling, "type": scaling["rope_type"]},
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": arch.rope_theta},
        **({"dtype": dtype, "torch_dtype": dtype} if dtype else {}),
    }


def _rope_from_hf(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling or None) from either spelling; where a config has both, they must agree."""
    found = []
    if config.get("rope_parameters"):
        found.append(_rope_entry(config["rope_parameters"], config))
    if "rope_theta" in config or config.get("rope_scaling"):
        found.append(_rope_entry(config.get("rope_scaling") or {}, config))
    if len(found) == 2 and found[0] != found[1]:
        raise CheckpointError(
            f"config.json: rope_parameters {found[0]} and rope_theta/rope_scaling {found[1]} disagree; "
            "remove the wrong one"
        )
    return found[0] if found else (10000.0, None)


def _rope_entry(entry: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    kind = entry.get("rope_type") or entry.get("type") or "default"
    if kind not in _ROPE_NEEDS:
        raise CheckpointError(f"config.json: rope type {kind!r} is not supported; supported: {', '.join(_ROPE_NEEDS)}")
    missing = [key for key in _ROPE_NEEDS[kind] if key not in entry]
    if missing:
        raise CheckpointError(f"config.json: rope type {kind!r} lacks {', '.join(missing)}")
    if (entry.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise CheckpointError("config.json: partial_rotary_factor other than 1 is not supported for Llama")
    theta = float(entry.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if kind == "default":
        return theta, None
    return theta, {"rope_type": kind, **{key: entry[key] for key in _ROPE_NEEDS[kind]}}


def _hidden(arch: Architecture) -> Shape:
    return (arch.hidden_size,)


def _vocab_by_hidden(arch: Architecture) -> Shape:
    return (arch.vocab_size, arch.hidden_size)


_LAYER, _HF_LAYER = "decoder.layers.{n}.", "model.layers.{n}."

_LAYER_RULES = (
    Rule(
        _LAYER + "input_layernorm.weight",
        (_HF_LAYER + "input_layernorm.weight",),
        dist_key=_LAYER + "self_attention.linear_qkv.layer_norm_weight",
        hf_shapes=lambda a: [_hidden(a)],
        full_shape=_hidden,
    ),
    Rule(
        _LAYER + "self_attention.linear_qkv.weight",
        tuple(_HF_LAYER + f"self_attn.{name}_proj.weight" for name in "qkv"),
        hf_shapes=linear_qkv_shapes,
        full_shape=lambda a: ((a.num_attention_heads + 2 * a.num_query_groups) * a.head_dim, a.hidden_size),
        cut="rows",
        to_megatron=merge_qkv,
        to_hf=split_qkv,
    ),
    Rule(
        _LAYER + "self_attention.linear_proj.weight",
        (_HF_LAYER + "self_attn.o_proj.weight",),
        hf_shapes=lambda a: [(a.hidden_size, a.num_attention_heads * a.head_dim)],
        full_shape=lambda a: (a.hidden_size, a.num_attention_heads * a.head_dim),
        cut="columns",
    ),
    Rule(
        _LAYER + "pre_mlp_layernorm.weight",
        (_HF_LAYER + "post_attention_layernorm.weight",),
        dist_key=_LAYER + "mlp.linear_fc1.layer_norm_weight",
        hf_shapes=lambda a: [_hidden(a)],
        full_shape=_hidden,
    ),
    Rule(
        _LAYER + "mlp.linear_fc1.weight",
        (_HF_LAYER + "mlp.gate_proj.weight", _HF_LAYER + "mlp.up_proj.weight"),
        hf_shapes=lambda a: [(a.ffn_hidden_size, a.hidden_size)] * 2,
        full_shape=lambda a: (2 * a.ffn_hidden_size, a.hidden_size),
        cut="gated_rows",
        to_megatron=stack_rows,
        to_hf=halve_rows,
    ),
    Rule(
        _LAYER + "mlp.linear_fc2.weight",
        (_HF_LAYER + "mlp.down_proj.weight",),
        hf_shapes=lambda a: [(a.hidden_size, a.ffn_hidden_size)],
        full_shape=lambda a: (a.hidden_size, a.ffn_hidden_size),
        cut="columns",
    ),
)
_EMBEDDING = Rule(
    "embedding.word_embeddings.weight",
    ("model.embed_tokens.weight",),
    hf_shapes=lambda a: [_vocab_by_hidden(a)],
    full_shape=_vocab_by_hidden,
    cut="vocab_rows",
    stage="first",
)
_FINAL_NORM = Rule(
    "decoder.final_layernorm.weight",
    ("model.norm.weight",),
    hf_shapes=lambda a: [_hidden(a)],
    full_shape=_hidden,
    stage="last",
)
_OUTPUT = Rule(
    "output_layer.weight",
    ("lm_head.weight",),
    hf_shapes=lambda a: [_vocab_by_hidden(a)],
    full_shape=_vocab_by_hidden,
    cut="vocab_rows",
    stage="last",
)


def rules(arch: Architecture) -> list[Rule]:
    """Every tensor of the model, once. Tied embeddings have no output layer of their own."""
    return [_EMBEDDING, *_LAYER_RULES, _FINAL_NORM, *([] if arch.tied_embeddings else [_OUTPUT])]

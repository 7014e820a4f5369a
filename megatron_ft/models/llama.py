"""Llama 1, 2, 3, CodeLlama, TinyLlama: RMSNorm, gated MLP, rotary embeddings, grouped-query attention, no biases.

Source of the entries: transformers' LlamaConfig, in the spelling of version 4 (rope_theta, rope_scaling, torch_dtype)
and of version 5 (rope_parameters, dtype). Both are read, both are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_ft.models import hf_config
from megatron_ft.models import rules as r
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.weights import Rule

NAME = "llama"
MODEL_TYPES = ("llama",)
HF_CLASSES = ("LlamaForCausalLM",)
ACTIVATION = hf_config.GATED_MLP

_HF = "model.layers.{n}."


def from_hf(config: Mapping[str, Any]) -> Architecture:
    """Convert a Hugging Face config.json to an Architecture. Raise CheckpointError with the reason for what is not supported."""
    return hf_config.read(config, NAME)


def to_hf(arch: Architecture, dtype: str | None = None) -> dict[str, Any]:
    """Return the inverse of from_hf, with the keys of transformers 4 and 5. `dtype`: as in transformers, "bfloat16"."""
    return hf_config.write(arch, NAME, HF_CLASSES[0], dtype, attention_bias=False, mlp_bias=False)


def rules(arch: Architecture) -> list[Rule]:
    """Return one rule for every tensor of the model. With tied embeddings there is no output layer. Also for Mistral and Qwen."""
    biases = [r.separate_qkv(_qkv("bias"), "bias")] if arch.qkv_bias else []
    head_norms = r.head_norms(_HF + "self_attn.q_norm.weight", _HF + "self_attn.k_norm.weight") if arch.qk_norm else []
    return [
        r.embedding("model.embed_tokens.weight"),
        *r.input_norm(arch, _HF + "input_layernorm"),
        r.separate_qkv(_qkv("weight")),
        *biases,
        *head_norms,
        r.attention_output(_HF + "self_attn.o_proj.weight"),
        *r.mlp_norm(arch, _HF + "post_attention_layernorm"),
        *r.gated_mlp(*(_HF + f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))),
        *r.final_norm(arch, "model.norm"),
        *([] if arch.tied_embeddings else [r.output_layer()]),
    ]


def _qkv(kind: str) -> tuple[str, str, str]:
    query, key, value = (_HF + f"self_attn.{name}_proj.{kind}" for name in "qkv")
    return query, key, value

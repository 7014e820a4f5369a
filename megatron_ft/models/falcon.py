"""Falcon 7B, 11B, 40B and 180B: parallel attention and MLP, LayerNorm with bias, linears without, embeddings usually tied.

7B: one query group for all heads (so tensor parallel size 1 only), one norm for attention and MLP. 40B and 180B: grouped
heads, a norm each. Their query_key_value matrix has megatron-core's order already: [q_1..q_n, k, v] for each group.

Source of the entries: transformers' FalconConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_ft.models import hf_config, hf_rope
from megatron_ft.models import rules as r
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.weights import Rule

NAME = "falcon"
MODEL_TYPES = ("falcon", "RefinedWeb", "RefinedWebModel")
HF_CLASSES = ("FalconForCausalLM",)

ACTIVATION = hf_config.ActivationEntry("activation", {name: name for name in ("gelu", "relu", "relu2", "silu")})
"""Releases of transformers from before the entry existed take GELU, whatever config.json says."""
_MUST_BE = {
    "alibi": (False, "ALiBi instead of rotary embeddings"),
    "bias": (False, "biases in the linears"),
}
_OLD_NAMES = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_head_kv": "num_kv_heads"}
_RENAMED = (
    *("num_hidden_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_kv_heads", "vocab_size"),
    *("max_position_embeddings", "layer_norm_epsilon", "activation", "tie_word_embeddings", "head_dim"),
    *("new_decoder_architecture", "multi_query", "parallel_attn", "num_ln_in_parallel_attn"),
)
_HF = "transformer.h.{n}."


def from_hf(config: Mapping[str, Any]) -> Architecture:
    """Convert a Hugging Face config.json to an Architecture. Raise CheckpointError with the reason for what is not supported."""
    old = {new: config[name] for name, new in _OLD_NAMES.items() if name in config}
    config = {**old, **{key: value for key, value in config.items() if key not in _OLD_NAMES}}
    new = bool(config.get("new_decoder_architecture")) or config.get("model_type") == "RefinedWeb"
    parallel = {} if new else {"parallel_attn": (True, "attention and MLP one after the other")}
    # The published models name code from before transformers supported them; it runs only with the user's permission.
    hf_config.refuse(config, {**_MUST_BE, **parallel}, ignore=("auto_map",))
    activation = hf_config.choice(config, ACTIVATION.key, ACTIVATION.names, "gelu")
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        positions = config.get("max_position_embeddings", 2048)
        theta, scaling = hf_rope.from_hf(config, positions)
        groups = config.get("num_kv_heads") or heads if new else 1 if config.get("multi_query", True) else heads
        norms = config.get("num_ln_in_parallel_attn") or 2 if new else 1
        return Architecture(
            family=NAME,
            num_layers=config["num_hidden_layers"],
            hidden_size=hidden,
            ffn_hidden_size=config.get("ffn_hidden_size") or 4 * hidden,
            num_attention_heads=heads,
            num_query_groups=groups,
            head_dim=hidden // heads,
            vocab_size=config["vocab_size"],
            max_position_embeddings=positions,
            norm_epsilon=config.get("layer_norm_epsilon", 1e-5),
            norm="layernorm",
            activation=activation,
            tied_embeddings=config.get("tie_word_embeddings", True),
            rope_theta=theta,
            rope_scaling=scaling,
            hf=hf_config.carried(config, (*_RENAMED, *_MUST_BE)),
            parallel_block=True,
            shared_norm=norms == 1,
        )
    except KeyError as error:
        raise hf_config.incomplete(error, NAME) from error


def to_hf(arch: Architecture, dtype: str | None = None) -> dict[str, Any]:
    """Return the inverse of from_hf. The older decoder is named if it is equivalent, as in Falcon-7B."""
    old = arch.shared_norm and arch.num_query_groups in (1, arch.num_attention_heads)
    return {
        **hf_config.head(arch, NAME, HF_CLASSES[0], dtype),
        "num_hidden_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        # The older decoder does not read it; transformers puts the number of heads there.
        "num_kv_heads": arch.num_attention_heads if old else arch.num_query_groups,
        "vocab_size": arch.vocab_size,
        "max_position_embeddings": arch.max_position_embeddings,
        "layer_norm_epsilon": arch.norm_epsilon,
        "tie_word_embeddings": arch.tied_embeddings,
        ACTIVATION.key: ACTIVATION.name_of(arch.activation),
        "new_decoder_architecture": not old,
        "multi_query": arch.num_query_groups == 1 or not old,
        "parallel_attn": True,
        "num_ln_in_parallel_attn": None if old else 1 if arch.shared_norm else 2,
        "alibi": False,
        "bias": False,
    }


def rules(arch: Architecture) -> list[Rule]:
    """Return one rule for every tensor of the model."""
    names: tuple[str, ...] = ("input_layernorm",) if arch.shared_norm else ("ln_attn", "ln_mlp")
    return [
        r.embedding("transformer.word_embeddings.weight"),
        *r.input_norm(arch, _HF + names[0]),
        r.fused_qkv(_HF + "self_attention.query_key_value.weight"),
        r.attention_output(_HF + "self_attention.dense.weight"),
        *([] if arch.shared_norm else r.mlp_norm(arch, _HF + names[1])),
        *r.plain_mlp(_HF + "mlp.dense_h_to_4h.weight", _HF + "mlp.dense_4h_to_h.weight"),
        *r.final_norm(arch, "transformer.ln_f"),
        *([] if arch.tied_embeddings else [r.output_layer()]),
    ]

"""A Hugging Face config in the keys that Llama, Mistral and Qwen share, to an Architecture and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from megatron_ft.errors import CheckpointError
from megatron_ft.models import hf_rope
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.stored_kinds import ENTRIES, refuse_stated


class ActivationEntry(NamedTuple):
    """How a family's config.json names the activation of the MLP."""

    key: str
    names: Mapping[str, str]
    """Value of the entry -> Architecture.activation."""

    def name_of(self, activation: str) -> str:
        """Return the value for Architecture.activation."""
        return next(name for name, ours in self.names.items() if ours == activation)


GATED_MLP = ActivationEntry("hidden_act", {"silu": "swiglu", "gelu": "geglu", "relu": "reglu", "relu2": "relu2glu"})
_MUST_BE = {
    "attention_bias": (False, "biases in the attention projections"),
    "mlp_bias": (False, "biases in the MLP"),
}
_FOREIGN = {
    "auto_map": (None, "code of its own (auto_map): only models that transformers itself implements are read"),
}
_RENAMED = (  # entries that an Architecture has as fields
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "hidden_act"),
)
_RESTATED = ("model_type", "architectures", "dtype", "torch_dtype", "_name_or_path", "transformers_version")


def read(
    config: Mapping[str, Any],
    family: str,
    taken: Sequence[str] = (),
    head_dim: int | None = None,
    positions: int = 2048,
    groups: int | None = None,
    **fields: Any,
) -> Architecture:
    """Convert a config. taken: additional keys that `fields` represent. head_dim, positions, groups: transformers' defaults of the family
    for entries that the config does not have. head_dim None: hidden / heads. groups None, or a null entry: as many as heads.

    Raise CheckpointError with the reason for what is not supported.
    """
    refuse(config, _MUST_BE)
    activation = choice(config, GATED_MLP.key, GATED_MLP.names, "silu")
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        positions = config.get("max_position_embeddings", positions)
        theta, scaling = hf_rope.from_hf(config, positions)
        return Architecture(
            family=family,
            num_layers=config["num_hidden_layers"],
            hidden_size=hidden,
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads", groups) or heads,
            head_dim=config.get("head_dim") or head_dim or hidden // heads,
            vocab_size=config["vocab_size"],
            max_position_embeddings=positions,
            norm_epsilon=config.get("rms_norm_eps", 1e-6),
            activation=activation,
            tied_embeddings=config.get("tie_word_embeddings", False),
            rope_theta=theta,
            rope_scaling=scaling,
            hf=carried(config, (*_RENAMED, *_MUST_BE, *taken)),
            **fields,
        )
    except KeyError as error:
        raise incomplete(error, family) from error


def write(arch: Architecture, model_type: str, hf_class: str, dtype: str | None, **entries: Any) -> dict[str, Any]:
    """Return the inverse of read. entries: keys of the family. dtype: as in transformers, "bfloat16"."""
    return {
        **head(arch, model_type, hf_class, dtype),
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
        GATED_MLP.key: GATED_MLP.name_of(arch.activation),
        **entries,
    }


def head(arch: Architecture, model_type: str, hf_class: str, dtype: str | None) -> dict[str, Any]:
    """Return the entries of every family's config: carried ones, its own name, rope, type."""
    return {
        **arch.hf,
        "architectures": [hf_class],
        "model_type": model_type,
        **hf_rope.to_hf(arch),
        **({"dtype": dtype, "torch_dtype": dtype} if dtype else {}),
    }


def carried(config: Mapping[str, Any], taken: Sequence[str]) -> dict[str, Any]:
    """Return the entries that no field represents."""
    known = {*taken, *_RESTATED, *_FOREIGN, *ENTRIES, *hf_rope.KEYS}
    return {key: value for key, value in config.items() if key not in known}


def refuse(config: Mapping[str, Any], must_be: Mapping[str, tuple[Any, str]], ignore: Sequence[str] = ()) -> None:
    """Raise CheckpointError, with the reason, where an entry is neither absent nor null nor what it must be."""
    refuse_stated(config)
    for key, (supported, reason) in {**must_be, **_FOREIGN}.items():
        if key not in ignore and config.get(key, supported) not in (supported, None):
            raise CheckpointError(f"config.json: {key} {config[key]!r} is not supported: {reason}")


def choice(config: Mapping[str, Any], key: str, table: Mapping[str, str], default: str) -> str:
    """Return the table's value for an entry. Raise CheckpointError, naming the values that are supported."""
    value = config.get(key) or default
    if value not in table:
        raise CheckpointError(f"config.json: {key} {value!r} is not supported; supported: {', '.join(table)}")
    return table[value]


def incomplete(error: KeyError, family: str) -> CheckpointError:
    return CheckpointError(f"config.json: entry {error} is missing; it is not a complete {family} config")

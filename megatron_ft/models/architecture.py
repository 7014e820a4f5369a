"""What a model is, apart from its numbers: the one description that all packages share.

It knows neither torch nor Hugging Face nor megatron-core: a family file (llama.py) makes it from a Hugging Face config,
the engine builds a model from it, a checkpoint carries it in its config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from megatron_ft.errors import CheckpointError, ConfigError

GATED = ("swiglu", "geglu", "reglu")


MOST_LAYERS = 10_000
_MOST = {
    "num_layers": MOST_LAYERS,
    **dict.fromkeys(("hidden_size", "ffn_hidden_size", "head_dim", "num_attention_heads", "num_query_groups"), 10**7),
    "vocab_size": 10**8,
    "max_position_embeddings": 10**9,
}
"""Larger than any model there is, small enough that nothing overflows or takes forever."""


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer. Sizes are those of the whole model, before any tensor or pipeline split."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    """The true size: rows that stand for a token. Padding rows are a matter of the layout (see padded_vocab_size)."""
    max_position_embeddings: int
    norm_epsilon: float
    norm: str = "rmsnorm"
    """rmsnorm, or layernorm (with bias)."""
    activation: str = "swiglu"
    """Gated: swiglu, geglu, reglu. Not gated: gelu (the exact one), relu."""
    tied_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    """A method and its numbers (see rope.py), as Hugging Face writes those it knows: {"rope_type": "linear", "factor": 4.0}.
    None: unscaled."""
    hf: dict[str, Any] = field(default_factory=dict)
    """Entries of the original Hugging Face config that no field stands for (token ids, ...), carried back on export."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections; no other linear has one."""
    qk_norm: bool = False
    """Each query and key head is normalised before the rotary embedding."""
    parallel_block: bool = False
    """Attention and MLP side by side on one residual: x + attention(norm x) + mlp(norm x)."""
    shared_norm: bool = False
    """A parallel block's attention and MLP read the same norm."""
    sliding_window: int | None = None
    """Keys a token sees, itself included. None: all before it."""
    full_attention_layers: int = 0
    """The first layers, to which the window does not apply."""

    def __post_init__(self):
        """Raises CheckpointError for a value that no model has: what is read from a file may hold anything."""
        for name, most in _MOST.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise CheckpointError(f"{name} {value!r}: must be a whole number from 1 to {most}")
        for name in ("norm_epsilon", "rope_theta"):
            value = getattr(self, name)
            if not _is_number(value) or value <= 0:
                raise CheckpointError(f"{name} {value!r}: must be a number above 0")
        if not isinstance(self.rope_scaling, dict | None) or not isinstance(self.hf, dict):
            raise CheckpointError("rope_scaling and hf must be lists of entries")
        for key, value in (self.rope_scaling or {}).items():
            numbers = value if isinstance(value, list) else [value]
            if not isinstance(key, str) or (key != "rope_type" and not all(map(_is_number, numbers))):
                raise CheckpointError(f"rope scaling {key} {str(value)[:40]!r}: must be a number")
        window = self.sliding_window
        if window is not None and (type(window) is not int or window < 1):
            raise CheckpointError(f"sliding_window {window!r}: must be at least 1, or absent")
        if self.num_attention_heads % self.num_query_groups:
            raise CheckpointError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_query_groups {self.num_query_groups}"
            )

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies two projections, [gate; up] in one matrix."""
        return self.activation in GATED

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Architecture:
        """Inverse of to_dict. Raises CheckpointError on an unknown or missing entry: a newer or damaged config.json."""
        if not isinstance(data, dict):
            raise CheckpointError("architecture is no list of entries; convert the model again")
        names = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - names)
        if unknown:
            raise CheckpointError(
                f"architecture has entries this version does not know: {', '.join(unknown)}; update megatron_ft"
            )
        try:
            return cls(**data)
        except TypeError as error:
            raise CheckpointError(f"architecture is incomplete ({error}); convert the model again") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e30  # neither infinite nor NaN


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int, multiple: int = 128) -> int:
    """Rows of the embedding under Megatron's rule: the next multiple of `multiple` x TP, so that ranks get equal parts.

    A vocabulary of 32007 takes 32128 rows with TP 1, 32768 with TP 8.
    """
    unit = multiple * tensor_model_parallel_size
    return -(-vocab_size // unit) * unit


def check_layout(arch: Architecture, tensor_model_parallel_size: int, pipeline_model_parallel_size: int = 1) -> None:
    """Raises ConfigError, naming the sizes that would do, unless every tensor can be cut evenly into TP x PP parts.

    Stages that may hold unequal numbers of layers are pipeline.py's business.
    """
    tp, pp = tensor_model_parallel_size, pipeline_model_parallel_size
    rules = (
        ("tensor_model_parallel_size", tp, "num_attention_heads", arch.num_attention_heads),
        ("tensor_model_parallel_size", tp, "num_query_groups", arch.num_query_groups),
        ("tensor_model_parallel_size", tp, "ffn_hidden_size", arch.ffn_hidden_size),
        ("pipeline_model_parallel_size", pp, "num_layers", arch.num_layers),
    )
    for flag, parts, name, size in rules:
        if parts < 1:
            raise ConfigError(f"--{flag} {parts}: must be at least 1")
        if size % parts:
            raise ConfigError(
                f"--{flag} {parts} does not divide the model's {name} {size}; sizes that do: {_divisors(size)}"
            )


def _divisors(size: int, at_most: int = 64) -> str:
    return ", ".join(str(d) for d in range(1, min(size, at_most) + 1) if size % d == 0)

"""The description of a model without its weights, which all packages share.

It uses neither torch nor Hugging Face nor megatron-core: a family file (llama.py) makes it from a Hugging Face config, the engine builds
a model from it, and the config.json of a checkpoint contains it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from megatron_ft.errors import CheckpointError, ConfigError
from megatron_ft.models.parts import AttentionPart, ExpertsPart, Layer, MlpPart, NormPart, Rope

GATED = ("swiglu", "geglu", "reglu", "relu2glu")
WITH_ZEROS = ("relu", "relu2", "reglu", "relu2glu")


MOST_LAYERS = 10_000
_MOST = {
    "num_layers": MOST_LAYERS,
    **dict.fromkeys(("hidden_size", "ffn_hidden_size", "head_dim", "num_attention_heads", "num_query_groups"), 10**7),
    "vocab_size": 10**8,
    "max_position_embeddings": 10**9,
}
_MOST_OF_EXPERTS = {"num_experts": 10_000, "experts_per_token": 10_000, "expert_ffn_hidden_size": 10**7}
"""Larger than any model there is, small enough that nothing overflows or takes forever."""
_NEWER = {
    "window_layers": None,
    "window_rope_theta": None,
    "rotary_share": 1.0,
    "num_experts": 0,
    "experts_per_token": 0,
    "expert_ffn_hidden_size": 0,
    "experts_renormalised": True,
    "dense_layers": (),
}
"""Fields that a description leaves out where they have these values: only few models have others."""


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
    """Number of tokens, without padding rows, which depend on the layout (see padded_vocab_size)."""
    max_position_embeddings: int
    norm_epsilon: float
    norm: str = "rmsnorm"
    """rmsnorm, or layernorm (with bias)."""
    activation: str = "swiglu"
    """Gated: swiglu, geglu, reglu, relu2glu. Not gated: gelu (the exact one), relu, relu2 (its square), silu."""
    tied_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    """A method and its numbers (see rope.py), as Hugging Face writes those it knows: {"rope_type": "linear", "factor": 4.0}.
    None: unscaled."""
    hf: dict[str, Any] = field(default_factory=dict)
    """Entries of the original Hugging Face config that no field represents (token ids, ...), written again on export."""
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
    window_layers: tuple[int, ...] | None = None
    """Numbers, from 0, of the layers that have the window; None: all but the first `full_attention_layers`."""
    window_rope_theta: float | None = None
    """Base of the rotary embedding in layers that have the window, which is not scaled there; None: as in the others."""
    rotary_share: float = 1.0
    """Share of each head that the rotary embedding turns."""
    num_experts: int = 0
    """MLPs of a layer, of which each token goes to some; 0: the model has no experts."""
    experts_per_token: int = 0
    expert_ffn_hidden_size: int = 0
    """Of one expert; `ffn_hidden_size` is that of layers without experts."""
    experts_renormalised: bool = True
    """A token's experts have weights that sum to 1 (norm_topk_prob)."""
    dense_layers: tuple[int, ...] = ()
    """Numbers, from 0, of the layers without experts in a model that has them."""

    def __post_init__(self) -> None:
        """Raise CheckpointError for a value that no model has: what is read from a file may hold anything."""
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
        self._check_parts()
        self._check_experts()
        if self.num_attention_heads % self.num_query_groups:
            raise CheckpointError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_query_groups {self.num_query_groups}"
            )

    def _check_parts(self) -> None:
        if self.window_layers is not None:
            self._take_layers("window_layers")
        if (self.window_layers is not None or self.window_rope_theta is not None) and self.sliding_window is None:
            raise CheckpointError("window_layers and window_rope_theta need a sliding_window")
        theta, share = self.window_rope_theta, self.rotary_share
        if theta is not None and (not _is_number(theta) or theta <= 0):
            raise CheckpointError(f"window_rope_theta {theta!r}: must be a number above 0")
        uneven = _is_number(share) and share != 1 and (self.rotary_dim % 2 or not self.rotary_dim)
        if not _is_number(share) or not 0 < share <= 1 or uneven:
            raise CheckpointError(
                f"rotary_share {share!r}: must be above 0, at most 1, and make an even number of a head's {self.head_dim}"
            )

    def _check_experts(self) -> None:
        self._take_layers("dense_layers")
        sizes = {name: getattr(self, name) for name in _MOST_OF_EXPERTS}
        for name, most in _MOST_OF_EXPERTS.items():
            if type(sizes[name]) is not int or not 0 <= sizes[name] <= most:
                raise CheckpointError(f"{name} {sizes[name]!r}: must be a whole number from 0 to {most}")
        if type(self.experts_renormalised) is not bool:
            raise CheckpointError(f"experts_renormalised {self.experts_renormalised!r}: must be true or false")
        if not self.num_experts:
            if any(sizes.values()) or self.dense_layers:
                raise CheckpointError("experts_per_token, expert_ffn_hidden_size and dense_layers need num_experts")
            return
        least = 2 if self.experts_renormalised else 1  # one weight that is divided by itself trains no router
        if not least <= self.experts_per_token <= self.num_experts or not self.expert_ffn_hidden_size:
            raise CheckpointError(
                f"num_experts {self.num_experts}: needs experts_per_token from {least} to that number, not {self.experts_per_token}, "
                f"and an expert_ffn_hidden_size above 0"
            )

    def _take_layers(self, name: str) -> None:
        """Make a field with numbers of layers a tuple: JSON has lists."""
        layers = getattr(self, name)
        if not isinstance(layers, list | tuple) or any(
            type(n) is not int or not 0 <= n < self.num_layers for n in layers
        ):
            raise CheckpointError(f"{name} {str(layers)[:80]}: must be numbers of layers, from 0")
        object.__setattr__(self, name, tuple(layers))

    @property
    def rotary_dim(self) -> int:
        """Return the number of entries of a head that the rotary embedding rotates."""
        return int(self.head_dim * self.rotary_share)

    def has_window(self, layer: int) -> bool:
        """Return whether a layer, counted from 0, has the sliding window."""
        if self.sliding_window is None:
            return False
        if self.window_layers is not None:
            return layer in self.window_layers
        return layer >= self.full_attention_layers

    def has_experts(self, layer: int) -> bool:
        """Return whether a layer, counted from 0, has experts."""
        return bool(self.num_experts) and layer not in self.dense_layers

    def layer(self, number: int) -> Layer:
        """Return the parts of a layer, counted from 0."""
        window = self.has_window(number)
        rope = Rope(self.rope_theta, self.rope_scaling, self.rotary_dim)
        if window and self.window_rope_theta is not None:
            rope = Rope(self.window_rope_theta, None, self.rotary_dim)
        attention = AttentionPart(
            self.num_attention_heads, self.num_query_groups, self.head_dim, self.qkv_bias, self.qk_norm,
            self.sliding_window if window else None, rope,
        )  # fmt: skip
        norm = NormPart(self.norm, self.norm_epsilon)
        return Layer(attention, self._mlp(number), norm, self.parallel_block, self.shared_norm)

    def _mlp(self, layer: int) -> MlpPart:
        if not self.has_experts(layer):
            return MlpPart(self.ffn_hidden_size, self.activation)
        experts = ExpertsPart(self.num_experts, self.experts_per_token, self.experts_renormalised)
        return MlpPart(self.expert_ffn_hidden_size, self.activation, experts)

    def with_layers(self, num_layers: int) -> Architecture:
        """Return the same model with fewer layers, its first ones."""
        left = self.window_layers and tuple(n for n in self.window_layers if n < num_layers)
        full = min(self.full_attention_layers, num_layers)
        dense = tuple(n for n in self.dense_layers if n < num_layers)
        return replace(self, num_layers=num_layers, window_layers=left, full_attention_layers=full, dense_layers=dense)

    @property
    def gated(self) -> bool:
        """Return whether the MLP multiplies two projections, [gate; up] in one matrix."""
        return self.activation in GATED

    @property
    def has_zeros(self) -> bool:
        """Return whether the activation makes many values exactly zero."""
        return self.activation in WITH_ZEROS

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types. What only few models have is left out where it is absent, so that earlier versions read the rest."""
        return {name: value for name, value in asdict(self).items() if name not in _NEWER or value != _NEWER[name]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Architecture:
        """Return the inverse of to_dict. Raise CheckpointError for an unknown or missing entry: the config.json is newer or damaged."""
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
    """Return the rows of the embedding by Megatron's rule: the next multiple of `multiple` x TP, so that all ranks get equal parts.

    A vocabulary of 32007 takes 32128 rows with TP 1, 32768 with TP 8.
    """
    unit = multiple * tensor_model_parallel_size
    return -(-vocab_size // unit) * unit


def check_layout(
    arch: Architecture,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
) -> None:
    """Raise ConfigError, with the sizes that fit, unless every tensor can be cut evenly into TP x PP parts, and experts into EP.

    pipeline.py handles stages with different numbers of layers.
    """
    tp, pp, ep = tensor_model_parallel_size, pipeline_model_parallel_size, expert_model_parallel_size
    rules = (
        ("tensor_model_parallel_size", tp, "num_attention_heads", arch.num_attention_heads),
        ("tensor_model_parallel_size", tp, "num_query_groups", arch.num_query_groups),
        ("tensor_model_parallel_size", tp, "ffn_hidden_size", arch.ffn_hidden_size),
        ("tensor_model_parallel_size", tp, "expert_ffn_hidden_size", arch.expert_ffn_hidden_size),
        ("expert_model_parallel_size", ep, "num_experts", arch.num_experts),
        ("pipeline_model_parallel_size", pp, "num_layers", arch.num_layers),
    )
    if ep > 1 and not arch.num_experts:
        raise ConfigError(
            f"--expert_model_parallel_size {ep}: the model has no experts that processes could share: use 1"
        )
    for flag, parts, name, size in rules:
        if parts < 1:
            raise ConfigError(f"--{flag} {parts}: must be at least 1")
        if size % parts:
            raise ConfigError(
                f"--{flag} {parts} does not divide the model's {name} {size}; sizes that do: {_divisors(size)}"
            )


def refuse_experts(arch: Architecture) -> None:
    """Raise ConfigError for a model with experts. For whatever trains, saves or converts: models with experts are only built so far."""
    if arch.num_experts:
        raise ConfigError(
            f"the model has experts (num_experts {arch.num_experts}), which cannot be trained, saved or converted yet: "
            f"use a model without"
        )


def _divisors(size: int, at_most: int = 64) -> str:
    return ", ".join(str(d) for d in range(1, min(size, at_most) + 1) if size % d == 0)

"""The parts of a layer. `Architecture.layer(n)` returns those of one layer; layers of a model may differ. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rope:
    """A rotary embedding."""

    theta: float
    """Base of the frequencies."""
    scaling: dict[str, Any] | None
    """As Architecture.rope_scaling."""
    dim: int
    """Numbers of a head that are turned, its first ones; the others pass as they are (partial rotary embedding)."""


@dataclass(frozen=True)
class AttentionPart:
    """Self-attention of one layer."""

    heads: int
    query_groups: int
    head_dim: int
    qkv_bias: bool
    qk_norm: bool
    window: int | None
    """Keys a token sees, itself included; None: all before it."""
    rope: Rope


@dataclass(frozen=True)
class ExpertsPart:
    """Several MLPs, of which a router chooses some for each token; their outputs are added up, weighted by its probabilities."""

    number: int
    per_token: int
    """Experts that a token goes to, those with the highest probabilities."""
    renormalised: bool
    """The weights are the probabilities divided by their sum over the chosen experts, not the probabilities themselves."""


@dataclass(frozen=True)
class MlpPart:
    """The MLP of one layer."""

    ffn_hidden_size: int
    """With experts, of each of them."""
    activation: str
    """As Architecture.activation."""
    experts: ExpertsPart | None = None
    """None: one MLP for all tokens (dense)."""


@dataclass(frozen=True)
class NormPart:
    """The norms of one layer."""

    kind: str
    """rmsnorm or layernorm."""
    epsilon: float


@dataclass(frozen=True)
class Layer:
    """One transformer layer. Two layers are of one kind where their parts are equal."""

    attention: AttentionPart
    mlp: MlpPart
    norm: NormPart
    parallel: bool
    """Attention and MLP side by side on one residual."""
    shared_norm: bool
    """They read the same norm."""

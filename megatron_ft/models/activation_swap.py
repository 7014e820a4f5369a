"""A model whose activation was swapped for another, such as GELU for ReLU. The weights stay; training has to make up for the change.

The description of the model keeps a record of it, which every checkpoint, conversion and export passes on:
config.json: "activation_swap": {"from": "gelu", "to": "relu"}, in the words of the family's Hugging Face config.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple

from megatron_ft.errors import ConfigError
from megatron_ft.models.architecture import Architecture
from megatron_ft.models.families import family_of
from megatron_ft.models.hf_config import ActivationEntry

SWAP = "activation_swap"
Activation = Literal["relu", "relu2", "silu", "gelu"]


class Swap(NamedTuple):
    """Names of activations in Hugging Face."""

    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.before} -> {self.after}"


def swap_activation(arch: Architecture, name: Activation) -> Architecture:
    """Return the model with another activation; a gated MLP stays gated. Raise ConfigError if config.json of its family cannot say it."""
    entry = entry_of(arch)
    if name not in entry.names:
        raise ConfigError(
            f"--activation {name}: config.json of a {arch.family} model cannot say it, so no export could; it can say "
            f"{', '.join(entry.names) or 'none'}"
        )
    earlier = swap_of(arch)
    before = earlier.before if earlier else entry.name_of(arch.activation)
    kept = {key: value for key, value in arch.hf.items() if key != SWAP}
    record = {SWAP: {"from": before, "to": name}} if before != name else {}
    return replace(arch, activation=entry.names[name], hf={**kept, **record})


def swap_of(arch: Architecture) -> Swap | None:
    """Return the recorded swap; None: the activation is the original one. A record that contradicts the activation does not count."""
    record: Any = arch.hf.get(SWAP)
    if not isinstance(record, dict) or not isinstance(record.get("from"), str):
        return None
    after = entry_of(arch).name_of(arch.activation)
    return Swap(record["from"], after) if record.get("to") == after != record["from"] else None


def before_swap(theirs: Architecture, ours: Architecture) -> Swap | None:
    """Return the swap that makes the activation of theirs that of ours; None: there is none. Theirs may be an earlier swap's result."""
    swap = swap_of(ours)
    if swap is None or theirs.family != ours.family or theirs.activation == ours.activation:
        return None
    now, earlier = entry_of(theirs).name_of(theirs.activation), swap_of(theirs)
    return Swap(now, swap.after) if swap.before == (earlier.before if earlier else now) else None


def in_words(arch: Architecture) -> str:
    """Return "activation gelu -> relu", or nothing without a swap."""
    swap = swap_of(arch)
    return f"activation {swap}" if swap else ""


def entry_of(arch: Architecture) -> ActivationEntry:
    """Return how the family's config.json names the activation."""
    entry: ActivationEntry = family_of(arch).ACTIVATION
    return entry

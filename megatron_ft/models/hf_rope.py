"""Converts the rotary settings of a Hugging Face config in both directions, with the keys of transformers 4 and 5.

Methods that transformers lacks are expressed by those it has, with the same frequencies: a raised base alone (ntk, ntk-margin), yarn with
factor 1 (ntk-yarn), longrope with a table (ntk-by-parts).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_ft.errors import CheckpointError
from megatron_ft.models.architecture import Architecture

KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings")
"""Config entries that this file converts."""
_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"),
}
_MAY_HAVE = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor"),
}
_ORIGINAL = "original_max_position_embeddings"
# finetuned: a note in YaRN's first exports. The others are read by themselves.
_KNOWN = {"rope_type", "type", "rope_theta", "partial_rotary_factor", _ORIGINAL, "finetuned"}


def from_hf(config: Mapping[str, Any], positions: int) -> tuple[float, dict[str, Any] | None]:
    """Return (theta, scaling or None) from either spelling; if a config has both, they must agree. Raise CheckpointError.

    A rope_theta without rope_scaling says nothing about scaling, so an equal one beside rope_parameters is no contradiction.
    """
    _refuse_partial(config)
    found = []
    if config.get("rope_parameters"):
        found.append(_entry(config["rope_parameters"], config, positions))
    if config.get("rope_scaling"):
        found.append(_entry(config["rope_scaling"], config, positions))
    elif config.get("rope_theta") is not None:
        found.append((float(config["rope_theta"]), found[0][1] if found else None))
    if len(found) == 2 and found[0] != found[1]:
        raise CheckpointError(
            f"config.json: rope_parameters {found[0]} and rope_theta/rope_scaling {found[1]} disagree; "
            "remove the wrong one"
        )
    return found[0] if found else (10000.0, None)


def _entry(entry: Mapping[str, Any], config: Mapping[str, Any], positions: int) -> tuple[float, dict[str, Any] | None]:
    kind = entry.get("rope_type") or entry.get("type") or "default"
    if kind not in _NEEDS:
        raise CheckpointError(f"config.json: rope type {kind!r} is not supported; supported: {', '.join(_NEEDS)}")
    if missing := [key for key in _NEEDS[kind] if entry.get(key) is None]:
        raise CheckpointError(f"config.json: rope type {kind!r} lacks {', '.join(missing)}")
    _refuse_partial(entry)
    taken = (*_NEEDS[kind], *_MAY_HAVE.get(kind, ()))
    if strange := [key for key in entry if key not in _KNOWN | set(taken) and entry[key] is not None]:
        raise CheckpointError(f"config.json: rope type {kind!r} with {strange[0]} is not supported")
    theta = float(entry.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if kind == "default":
        return theta, None
    scaling = {"rope_type": kind, **{key: entry[key] for key in taken if entry.get(key) is not None}}
    if kind in ("yarn", "longrope"):
        scaling[_ORIGINAL] = entry.get(_ORIGINAL) or config.get(_ORIGINAL) or positions
    return theta, scaling


def _refuse_partial(entry: Mapping[str, Any]) -> None:
    if (entry.get("partial_rotary_factor") or 1.0) != 1.0:
        raise CheckpointError("config.json: partial_rotary_factor other than 1 is not supported")


def to_hf(arch: Architecture) -> dict[str, Any]:
    """Return rope_theta, rope_scaling and rope_parameters. Raise CheckpointError for a method that Hugging Face does not have."""
    theta, scaling = _hf_settings(arch)
    return {
        "rope_theta": theta,
        "rope_scaling": scaling and {**scaling, "type": scaling["rope_type"]},
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": theta},
    }


def _hf_settings(arch: Architecture) -> tuple[float, dict[str, Any] | None]:
    from megatron_ft.models import rope  # imported here, because configs are read without torch

    theta, scaling = arch.rope_theta, arch.rope_scaling
    kind = scaling["rope_type"] if scaling else "default"
    if not scaling or kind == "default":
        return theta, None
    if kind in rope.BASE_METHODS:
        raised = rope.scaled_base(arch.head_dim, theta, scaling)
        if kind != "ntk-yarn":
            return raised, None
        factor = rope.attention_factor(scaling, arch.max_position_embeddings)
        # Positions equal to the original ones: else transformers would compute another factor from their ratio.
        same = {_ORIGINAL: arch.max_position_embeddings}
        return raised, {"rope_type": "yarn", "factor": 1.0, "attention_factor": factor, **same}
    if kind == "ntk-by-parts":
        positions = arch.max_position_embeddings
        plain = rope.inverse_frequencies(arch.head_dim, theta, None, positions)
        table = (plain / rope.inverse_frequencies(arch.head_dim, theta, scaling, positions)).tolist()
        both = {"short_factor": table, "long_factor": table, "attention_factor": 1.0}
        return theta, {"rope_type": "longrope", **both, "factor": scaling["factor"], _ORIGINAL: scaling[_ORIGINAL]}
    if kind in _NEEDS:
        return theta, scaling
    raise CheckpointError(
        f"rope scaling {kind!r} has no counterpart in a Hugging Face config, so an export would answer differently: "
        f"train with one of {', '.join(rope.METHODS[1:])}"
    )

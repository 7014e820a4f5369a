"""Finds the model that stored adapters belong to. Without torch."""

from __future__ import annotations

from pathlib import Path

from megatron_ft.checkpoints.folder import CheckpointConfig, find_checkpoint, read_config
from megatron_ft.checkpoints.select import same_sizes
from megatron_ft.errors import CheckpointError, UserError


def find_base(described: CheckpointConfig, folder: Path, given: str | None, load: str | None = None) -> Path:
    """Return the checkpoint with the model that stored adapters belong to: the one given, else --load, else the recorded one.

    folder: of the adapters. Raise CheckpointError if there is none, or it is of another shape.
    """
    recorded = described.adapter.get("base") if described.adapter else None
    if not isinstance(recorded, dict) or not isinstance(recorded.get("path"), str) or "weights" not in recorded:
        raise CheckpointError(
            f"{folder}: the entry adapter of config.json does not name its base; use another checkpoint"
        )
    named = given or _whole_model(load) or recorded["path"]
    try:
        base = find_checkpoint(Path(named))
        config = read_config(base)
    except UserError as error:
        raise CheckpointError(
            f"{folder} holds adapters of the model in {named}, which cannot be read ({error}): give it with --base"
        ) from error
    if config.adapter is not None:
        raise CheckpointError(f"{base} holds adapters, not the model that they are added to: give that with --base")
    if not same_sizes(config.architecture, described.architecture):
        raise CheckpointError(
            f"{base} is another model than the one that the adapters in {folder} belong to: give that with --base"
        )
    return base


def _whole_model(load: str | None) -> str | None:
    """Return --load if it holds the weights of a model, None if it holds adapters or nothing."""
    try:
        return load if load and read_config(find_checkpoint(Path(load))).adapter is None else None
    except UserError:
        return None

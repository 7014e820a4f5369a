"""Adapters as whole matrices: read from a checkpoint of this project, of any layout."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from megatron_ft.adapters.spec import Lora
from megatron_ft.checkpoints.folder import MODEL_PREFIX, CheckpointConfig
from megatron_ft.checkpoints.restricted import file_slice, read_metadata
from megatron_ft.errors import CheckpointError, DamagedError


def read_checkpoint(folder: Path, config: CheckpointConfig) -> tuple[Lora, dict[str, Tensor]]:
    """Return the adapters in a checkpoint, every parameter by its name. Raise CheckpointError for what is damaged or incomplete."""
    lora = Lora.from_dict(config.adapter, config.architecture)
    shapes = lora.shapes(config.architecture)
    found = {name: torch.empty(0) for name in shapes}
    covered = dict.fromkeys(shapes, 0)
    metadata = read_metadata(folder / ".metadata")
    for index, place in metadata.storage_data.items():
        name = index.fqn.removeprefix(MODEL_PREFIX)
        if name not in shapes or name == index.fqn:
            continue
        part = _read(folder / place.relative_path, place.offset, place.length)
        if not covered[name]:
            found[name] = torch.empty(shapes[name], dtype=part.dtype)
        box = tuple(slice(start, start + size) for start, size in zip(index.offset or (), part.shape, strict=False))
        if found[name][box].shape != part.shape:
            raise CheckpointError(
                f"{folder}: {name} is of another shape than its config.json says; use another checkpoint"
            )
        found[name][box] = part
        covered[name] += part.numel()
    _check_covered(folder, ((name, covered[name], rows * columns) for name, (rows, columns) in shapes.items()))
    return lora, found


def _check_covered(folder: Path, counts: Iterable[tuple[str, int, int]]) -> None:
    for name, found, wanted in counts:
        if found != wanted:
            raise CheckpointError(
                f"{folder} lacks {name}, or a part of it: the checkpoint is incomplete; use another one"
            )


def _read(path: Path, offset: int, length: int) -> Tensor:
    try:
        part = torch.load(file_slice(path, offset, length), map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise DamagedError(f"{path} is damaged at byte {offset}; use an earlier checkpoint") from error
    if not isinstance(part, Tensor):
        raise DamagedError(f"{path} is damaged at byte {offset}; use an earlier checkpoint")
    return part

"""Adapters as whole matrices: read from a checkpoint of this project, of any layout, or from a PEFT folder."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ft.adapters.peft_files import is_peft, open_peft
from megatron_ft.adapters.spec import Lora, Projection
from megatron_ft.checkpoints.folder import MODEL_PREFIX, CheckpointConfig, find_checkpoint, read_config
from megatron_ft.checkpoints.restricted import file_slice, read_metadata
from megatron_ft.checkpoints.select import same_sizes
from megatron_ft.errors import CheckpointError, DamagedError
from megatron_ft.models.architecture import Architecture


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


@dataclass(frozen=True)
class Stored:
    """Adapters of a checkpoint or a PEFT folder. read: name of a parameter in a checkpoint -> the whole matrix."""

    folder: Path
    lora: Lora
    read: Callable[[str], Tensor]
    recorded: Any
    """Hashes of the model's weights; None: not recorded, as in what PEFT has written."""
    carried: Any = None
    """adapter_config.json of the adapter that training began with."""
    nf4: bool = False
    """They were trained on a base that was quantised when it was loaded."""

    def delta(self, layer: int, projection: Projection) -> Tensor:
        """Return what a merge adds to a matrix, fp32 [rows, columns]: scale * B A, computed as PEFT does."""
        low, high = (self.read(projection.key(layer, part)).float() for part in "AB")
        return (high @ low) * self.lora.scale


def open_adapters(folder: Path, arch: Architecture) -> Stored:
    """Open adapters of a model: a checkpoint (its root, or one iter_ folder) or a PEFT folder. Raise CheckpointError."""
    if is_peft(folder):
        peft = open_peft(folder, arch)
        return Stored(peft.folder, peft.lora, peft.read, peft.recorded, peft.config)
    found = find_checkpoint(folder)
    config = read_config(found)
    if config.adapter is None:
        raise CheckpointError(
            f"{found} holds a model, not adapters: give a checkpoint of a run with --lora_rank, or a PEFT folder"
        )
    if not same_sizes(config.architecture, arch):
        raise CheckpointError(f"{found} holds adapters of another model than the one that they are to be added to")
    return of_checkpoint(found, config)


def of_checkpoint(folder: Path, config: CheckpointConfig) -> Stored:
    """Return the adapters in a checkpoint."""
    lora, weights = read_checkpoint(folder, config)
    entry = config.adapter or {}
    base = entry.get("base") or {}
    nf4 = base.get("precision") == "nf4"
    return Stored(folder, lora, weights.__getitem__, base.get("weights"), entry.get("peft"), nf4)

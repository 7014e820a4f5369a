"""The folder of a model's predictors: predictors.safetensors, predictors.json, digests.json."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron_ft.digests import check_digests, has_digests, write_digests
from megatron_ft.errors import CheckpointError
from megatron_ft.files import atomic_folder, read_json, write_json
from megatron_ft.models.architecture import Architecture
from megatron_ft.sparse.fitting import Quality
from megatron_ft.sparse.predictors import Thin

DESCRIPTION, TENSORS, VERSION = "predictors.json", "predictors.safetensors", 1
_PARTS = ("low", "high", "bias")


@dataclass(frozen=True)
class Stored:
    """Predictors of all layers, and the hash of the matrices that they predict."""

    layers: list[Thin]
    model: dict[str, str]


def write_predictors(
    folder: str | Path, layers: Sequence[Thin], model: dict[str, str], qualities: Sequence[Quality], how: dict[str, Any]
) -> None:
    """Write a new folder, completely or not at all. how: what else is recorded."""
    with atomic_folder(folder) as unfinished:
        tensors = {
            f"layers.{number}.{part}": getattr(thin, part).to(torch.float32).contiguous()
            for number, thin in enumerate(layers)
            for part in _PARTS
        }
        save_file(tensors, str(unfinished / TENSORS))
        said = {"version": VERSION, "model": model, **how, "layers": [asdict(one) for one in qualities]}
        write_json(unfinished / DESCRIPTION, said)
        write_digests(unfinished)


def read_predictors(folder: Path, arch: Architecture) -> Stored:
    """Read the predictors of a model. Raise CheckpointError for what is damaged, or made for another kind of model."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no predictors ({DESCRIPTION}): make them with megatron-ft train-predictors"
        )
    if has_digests(folder):
        check_digests(folder)
    said = read_json(path)
    if not isinstance(said, dict) or said.get("version") != VERSION or not isinstance(said.get("model"), dict):
        raise CheckpointError(f"{path} is not a description of predictors of version {VERSION}; make them again")
    try:
        tensors = load_file(str(folder / TENSORS))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / TENSORS} cannot be read ({error}); make the predictors again") from error
    return Stored([_layer(folder, tensors, number, arch) for number in range(arch.num_layers)], said["model"])


def _layer(folder: Path, tensors: dict[str, torch.Tensor], number: int, arch: Architecture) -> Thin:
    parts = [tensors.get(f"layers.{number}.{part}") for part in _PARTS]
    rank = parts[0].shape[0] if parts[0] is not None and parts[0].dim() == 2 else 0
    wanted = [(rank, arch.hidden_size), (arch.ffn_hidden_size, rank), (arch.ffn_hidden_size,)]
    if not rank or any(part is None or tuple(part.shape) != shape for part, shape in zip(parts, wanted, strict=True)):
        raise CheckpointError(f"{folder} holds no predictor that fits layer {number} of this model; make them again")
    made = Thin(*(part.float() for part in parts if part is not None))
    if not all(math.isfinite(float(part.sum())) for part in (made.low, made.high, made.bias)):
        raise CheckpointError(f"{folder}: the predictor of layer {number} is not finite; make them again")
    return made
